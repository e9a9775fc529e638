"""Where every array of a run lies on a mesh: by shapes alone."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from moejax import mesh
from moejax.config_mesh import MeshConfig
from moejax.errors import UserError
from moejax.models.build import build
from moejax.models.config import PRESETS, LoRAConfig, Quantization
from moejax.models.layers import Frozen, Placement
from moejax.models.ops import quantized
from moejax.training.adam8 import adamw_8bit
from moejax.training.program import split


def specs(tree, shardings):
    """Path -> (shape, spec, memory)."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = [jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value") for path, _ in leaves]
    places = jax.tree.leaves(shardings)
    return {name: (leaf.shape, tuple(s.spec), s.memory_kind) for name, (_, leaf), s in zip(names, leaves, places, strict=True)}


def parts(preset="mixtral-tiny", quantized=True, **more):
    model = build(PRESETS[preset], quantization=Quantization(True) if quantized else None, adapter=LoRAConfig(4, 8.0, 0.0, None), **more)
    return split(model, full=False)[1:]


def on(count=4, **values):
    return mesh.abstract(MeshConfig(**values), count)


def spread_in(tree, shardings):
    return {name for name, (_, spec, _) in specs(tree, shardings).items() if spec}


def test_experts_lie_with_their_matrices_adapters_and_moments():
    trainable, frozen = parts()
    devices = on(weights="experts")
    found = specs(frozen, devices.of_weights(frozen)) | specs(trainable, devices.of_weights(trainable))
    for name, (shape, spec, _) in found.items():
        of_experts = ".moe.w" in name
        assert spec == ((None, "data") if of_experts else ()), name
        assert not of_experts or shape[1] == 8
    assert sum(name.endswith(("codes", "absmax", "nested_absmax", "offset")) for name in found if ".moe.w" in name) == 12
    state = jax.eval_shape(optax.adamw(1e-3).init, trainable)
    moments = specs(state, devices.of_optimizer(state))
    assert {name for name, (_, spec, _) in moments.items() if spec} == {name for name in moments if ".moe.w" in name}


@pytest.mark.parametrize("preset", ["mixtral-tiny", "gpt-oss-tiny", "deepseek-v3-tiny", "blackmamba-tiny"])
def test_spread_takes_frozen_matrices_by_their_rows(preset):
    quantized = preset != "blackmamba-tiny"
    if preset == "blackmamba-tiny":
        frozen = split(build(PRESETS[preset], quantization=Quantization(True)), full=False)[2]
    else:
        frozen = parts(preset, quantized)[1]
    found = specs(frozen, on(weights="spread").of_weights(frozen))
    for name, (shape, spec, _) in found.items():
        rows = len(shape) - 2
        assert spec in ((), (*[None] * rows, "data")), name
        assert not spec or (shape[rows] % 4 == 0 and not {"router", "embed", "head", "conv"} & set(name.split("."))), name
        assert not (name.endswith(".codes") and ".router" not in name and shape[-2] % 4 == 0 and not spec), name
    assert any(".moe.w1" in name and spec for name, (_, spec, _) in found.items())


def test_a_tpus_parts_are_gathered_as_they_were():
    """Of four devices: codes by blocks, folded scales by what pads least; and each device has the whole matrix's values."""
    weight = quantized.quantize("nf4-double", jax.random.normal(jax.random.key(0), (1, 256, 768)), "columns")
    tree = {"weight": Frozen(weight, axes=("layers", "out", "in"))}
    devices = mesh.devices(MeshConfig(devices=4, weights="spread"))
    places = devices.of_weights(tree)
    placed = places["weight"].get_value()
    assert [tuple(getattr(placed, name).spec) for name in weight.parts()] == [(None, "data"), (None, "data"), (None, None, "data"), ()]

    def whole(tree):
        part = tree["weight"].get_value()
        assert not part.is_whole and part.shape == weight.shape
        return part.gathered().dequantize(jnp.float32)

    found = jax.jit(lambda tree: devices.over_rows(whole, (places,), mesh.WHOLE, tree))(tree)
    assert jnp.array_equal(found, weight.dequantize(jnp.float32))


def test_what_does_not_divide_is_whole():
    trainable, frozen = parts()
    for weights in ("spread", "experts"):
        assert not spread_in(frozen, on(7, weights=weights, moments="spread").of_weights(frozen))
    assert not spread_in(trainable, on(7, moments="spread").of_optimizer(trainable))


def test_moments_are_spread_by_their_longest_axis():
    trainable, _ = parts()
    state = jax.eval_shape(optax.adamw(1e-3).init, trainable)
    devices = on(moments="spread")
    found = specs(state, devices.of_optimizer(state))
    for name, (shape, spec, _) in found.items():
        assert len(shape) == 0 or shape[spec.index("data")] == max(size for size in shape if size % 4 == 0), name
    whole, part = (mesh.device_bytes(state, d.of_optimizer(state)) for d in (on(), devices))
    assert part - 4 == (whole - 4) / 4  # all but the count


def test_moments_in_8_bits_lie_with_their_experts():
    """Codes, and the scales of blocks, which do not run over a matrix's end."""
    trainable = split(build(PRESETS["mixtral-tiny"]), full=True)[1]
    rule = adamw_8bit(optax.constant_schedule(1e-3), 0.9, 0.999, 1e-8, 0.0, lambda weights: jax.tree.map(lambda _: False, weights))
    state = jax.eval_shape(rule.init, trainable)
    found = specs(state, on(weights="experts").of_optimizer(state))
    for name, (shape, spec, _) in found.items():
        assert spec == ((None, "data") if ".moe.w" in name else ()) and (not spec or shape[1] == 8), name
    assert sum(".moe.w" in name and name.endswith(("codes", "largest")) for name in found) == 3 * 2 * 2


def test_experts_in_the_hosts_memory_stay_there():
    _, frozen = parts(placement=Placement(experts=2))
    found = specs(frozen, on(weights="experts").of_weights(frozen))
    in_host = {name for name, (_, _, memory) in found.items() if memory == "pinned_host"}
    assert in_host and all("pieces" in name and found[name][1] == (None, "data") for name in in_host)


def test_a_tree_of_shardings_has_the_form_of_its_tree():
    trainable, frozen = parts()
    for tree in (trainable, frozen, {"a": [nnx.Param(jax.ShapeDtypeStruct((4, 2), "float32"))]}):
        for shardings in (on().of_weights(tree), on().of_optimizer(tree), on().whole(tree), on().of_rows(tree)):
            assert jax.tree.structure(shardings) == jax.tree.structure(tree)


def test_more_devices_than_there_are():
    with pytest.raises(UserError, match=r"mesh.devices = 64: expected at most 4,.*XLA_FLAGS=--xla_force_host_platform_device_count=64"):
        mesh.devices(MeshConfig(devices=64))
    assert mesh.devices(MeshConfig()).count == len(jax.devices())


def test_unlike_devices():
    class Card:
        def __init__(self, kind, number):
            self.device_kind, self.id = kind, number

    with pytest.raises(UserError, match=r"NVIDIA L4: 0, 2; Tesla T4: 1"):
        mesh.devices(MeshConfig(), [Card("NVIDIA L4", 0), Card("Tesla T4", 1), Card("NVIDIA L4", 2)])
