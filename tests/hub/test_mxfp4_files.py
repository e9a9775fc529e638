"""Checkpoints with experts in MXFP4: read as they are, kept as they are, or refused with what is wrong with them."""

import dataclasses
import json
from contextlib import ExitStack
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from support import full_logits

from moejax.config import Experiment
from moejax.errors import UserError
from moejax.estimator import sizes as estimated
from moejax.hub import merge, quantized_cache, stored, weights
from moejax.hub.model import architecture, create_model
from moejax.hub.names import tensors
from moejax.hub.quantized_cache import Content
from moejax.hub.streaming import whole_shape
from moejax.models import foreign_settings as foreign
from moejax.models.build import build
from moejax.models.config import FAMILIES, PRESETS, LoRAConfig, Quantization, Qwen3MoeConfig
from moejax.models.layers import Placement
from moejax.models.ops import host, mxfp4
from moejax.models.ops.quantized import abstract

D, F, E, LAYERS = 64, 96, 4, 2
EXPERTS = "model.layers.{}.mlp.experts."
GATE_UP, DOWN = f"{EXPERTS}gate_up_proj", f"{EXPERTS}down_proj"
SCALES, BLOCKS = (f"{GATE_UP.format(1)}_{part}" for part in ("scales", "blocks"))


class InBlocks(Qwen3MoeConfig):
    """Qwen3's layers, and experts' files as gpt-oss has them."""

    model_type: ClassVar[str] = "in_blocks"
    known: ClassVar = {**Qwen3MoeConfig.known, "quantization_config": foreign.MXFP4}

    @property
    def names(self):
        (block,) = super().names.blocks
        return dataclasses.replace(super().names, blocks=(dataclasses.replace(block, interleaved=True),))


SIZES = PRESETS["qwen3-moe-tiny"].replace(num_layers=LAYERS, num_experts=E, experts_per_token=2, hidden_size=D, intermediate_size=F)
CONFIG = InBlocks(**{name: getattr(SIZES, name) for name in SIZES.fields()})
QUANTIZATION = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder, what is in it, and the same model with its experts as numbers: theirs, [L, E, out, in] by name."""
    folder = tmp_path_factory.mktemp("in_blocks")
    draw, shapes = np.random.default_rng(0), build(CONFIG)
    files = {
        name: draw.normal(size=whole_shape(shapes, places)).astype(np.float32) / 8 + ("norm" in name)
        for name, places in tensors(CONFIG).items()
        if ".experts." not in name
    }
    meant = {}
    for name, rows, columns in ((GATE_UP, 2 * F, D), (DOWN, D, F)):
        values = []
        for layer in range(LAYERS):
            blocks = draw.integers(0, 256, (E, rows, columns // 32, 16), np.uint8)
            scales = draw.integers(120, 124, (E, rows, columns // 32), np.uint8)
            files |= {f"{name.format(layer)}_blocks": blocks, f"{name.format(layer)}_scales": scales}
            codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(E, rows, columns)
            numbers = np.where(codes > 7, -1, 1) * mxfp4.CODEBOOK[codes & 7] * np.exp2(np.repeat(scales, 32, -1).astype(np.float32) - 127)
            values.append(numbers.astype(np.float32))
        meant[name] = np.stack(values)
    save_file(files, str(folder / "model.safetensors"))
    hub_config = CONFIG.to_hub_config() | {"model_type": "in_blocks", "quantization_config": QUANTIZATION}
    (folder / "config.json").write_text(json.dumps(hub_config))
    return folder, files, {"w1": meant[GATE_UP][:, :, 0::2], "w3": meant[GATE_UP][:, :, 1::2], "w2": meant[DOWN]}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(FAMILIES, "in_blocks", InBlocks)


def experiment(folder, **sections):
    content = {
        "name": "a", "model": {"source": str(folder)}, "adapter": {"rank": 2, "targets": ["w1", "w2", "w3", "q_proj"]},
        "data": {"batching": "fixed", "row_tokens": 16}, "training": {"steps": 1, "compute_dtype": "float32"},
    }  # fmt: skip
    return Experiment.model_validate(content | sections)


def loaded(folder, **sections):
    asked = experiment(folder, **sections)
    return create_model(asked, architecture(asked, folder), folder)


def in_numbers(folder, files, meant, tmp_path):
    """The same as a Qwen3 of one matrix an expert, nothing in 4 bits."""
    kept = {name: value for name, value in files.items() if ".experts." not in name}
    names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    for w, value in meant.items():
        for layer, expert in np.ndindex(LAYERS, E):
            kept[f"{EXPERTS.format(layer)}{expert}.{names[w]}.weight"] = np.ascontiguousarray(value[layer, expert])
    save_file(kept, str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps(SIZES.to_hub_config()))
    return tmp_path


def test_codes_and_scales_are_the_files_own(written):
    """w1 and w3 are every other row, w2 all; layer by layer, expert by expert; and they mean what transformers makes of them."""
    folder, files, meant = written
    model = loaded(folder)
    for w, name, rows in (("w1", GATE_UP, slice(0, None, 2)), ("w3", GATE_UP, slice(1, None, 2)), ("w2", DOWN, slice(None))):
        value = getattr(model.layers.moe, w).weight.get_value()
        assert value.kind == "mxfp4" and value.codes.dtype == jnp.uint8
        parts = value.canonical().parts
        for layer, expert in np.ndindex(LAYERS, E):
            blocks, scales = (files[f"{name.format(layer)}_{part}"][expert][rows] for part in ("blocks", "scales"))
            np.testing.assert_array_equal(parts["codes"][layer, expert], blocks.reshape(-1))
            np.testing.assert_array_equal(parts["scales"][layer, expert], scales.reshape(-1))
        np.testing.assert_array_equal(value.dequantize(jnp.float32), meant[w])
    assert model.layers.attention.q_proj.weight.get_value().dtype == jnp.float32


@pytest.mark.parametrize("backend", ["loop", "capacity"])
def test_the_model_is_that_of_its_numbers(backend, written, tmp_path):
    folder, files, meant = written
    ids = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (2, 9), np.int32)
    mask = np.ones_like(ids)
    positions = np.broadcast_to(np.arange(9, dtype=np.int32), ids.shape)
    logits = [
        full_logits(loaded(path, model={"source": str(path), "moe_backend": backend}), ids, mask, positions)
        for path in (folder, in_numbers(folder, files, meant, tmp_path))
    ]
    assert np.abs(logits[0]).max() > 1
    np.testing.assert_allclose(*logits, atol=1e-6 * np.abs(logits[0]).max())


def test_trained_whole_they_are_numbers(written):
    folder, _, meant = written
    model = loaded(folder, adapter=None)
    for w, value in meant.items():
        np.testing.assert_array_equal(getattr(model.layers.moe, w).weight.get_value(), value)


def test_what_is_merged_is_what_was_trained(written):
    folder, _, meant = written
    asked = experiment(folder)
    model = build(architecture(asked, folder), adapter=LoRAConfig(rank=2, targets=("w3",)))
    module = model.layers.moe.w3.lora
    draw = np.random.default_rng(2)
    for variable in (module.a, module.b):
        variable.set_value(jnp.asarray(draw.normal(size=variable.get_value().shape), jnp.float32))
    a, b = (np.asarray(v.get_value()[1, 3]) for v in (module.a, module.b))
    with ExitStack() as stack:
        files = stored.open_tensors(folder, stack, model.config)
        for w, name in (("w1", "gate_proj"), ("w3", "up_proj")):
            merged = merge.merged_tensor(model, f"{EXPERTS.format(1)}3.{name}.weight", files, folder)
            expected = meant[w][1, 3] + (np.float32(module.scale) * (b @ a) if w == "w3" else 0)
            np.testing.assert_array_equal(merged, expected)


def test_attention_is_quantized_if_asked_and_experts_are_not_again(written):
    folder, _, meant = written
    model = loaded(folder, quantization={"format": "nf4", "cache": None})
    assert model.layers.attention.q_proj.weight.get_value().kind == "nf4-double"
    np.testing.assert_array_equal(model.layers.moe.w2.weight.get_value().dequantize(jnp.float32), meant["w2"])
    message = r"quantization: modules \['attention', 'experts'\]: the checkpoint's experts are in MXFP4, and stay so: leave experts out"
    with pytest.raises(UserError, match=message):
        loaded(folder, quantization={"format": "nf4", "modules": ["attention", "experts"]})


def test_the_hash_is_of_the_files_own_bytes(written, tmp_path):
    """One code of one expert is another model; nothing is kept for the next start, as it is read as fast."""
    folder, files, _ = written
    hashes = []
    for path in (folder, tmp_path):
        if path == tmp_path:
            changed = files[GATE_UP.format(0) + "_blocks"].copy()
            changed[2, 1, 0, 5] ^= 1
            save_file(files | {GATE_UP.format(0) + "_blocks": changed}, str(tmp_path / "model.safetensors"))
            (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        content = Content()
        sizes = weights.read_config(path)
        model = build(sizes, adapter=LoRAConfig(rank=2))
        weights.load_weights(model, path, jax.random.key(0), cache=tmp_path / "cache", content=content)
        hashes.append(content.value)
    assert len(set(hashes)) == 2 and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("place", ["device", "host"])
def test_estimated_bytes_are_those_of_the_model(place, written):
    """Of codes and scales, 4.25 bits a weight; all of them go where the experts are placed."""
    folder, _, _ = written
    asked = experiment(folder, placement={"experts": place})
    config = architecture(asked, folder)
    model = build(config, quantization=Quantization(modules=()), placement=Placement(place))
    of_experts = [w for w in estimated.stored(asked, config) if w.module[-1] in ("w1", "w2", "w3") and not w.adapter]
    assert len(of_experts) == 3
    for w in of_experts:
        value = getattr(model.layers.moe, w.module[-1]).weight.get_value()
        nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(value))
        assert w.bytes == nbytes == w.size * 4.25 / 8 and w.storage == "MXFP4"
        assert sum(w.host.values()) == host.nbytes(value) == (nbytes if place == "host" else 0)


def test_a_cache_of_quantized_weights_holds_them_too(tmp_path):
    """In the files' own bytes: codes and scales as they were put there."""
    draw = np.random.default_rng(4)
    held = {"w": abstract("mxfp4", (2, 3, 4, 96))}
    leaves = quantized_cache.leaves_of(held)
    parts = {name: draw.integers(0, 250, leaf.shape, np.uint8) for name, leaf in leaves.items()}
    with quantized_cache.Keeper(tmp_path / "kept.safetensors", leaves) as keep:
        for index in np.ndindex(2, 3):
            for name, value in parts.items():
                keep.put(name, value[index], index)
            keep.wait()
    found = quantized_cache.read(tmp_path / "kept.safetensors", held)["w"].canonical()
    for name, value in found.parts.items():
        np.testing.assert_array_equal(value, parts[f"w.{name}"])


def spoiled(files, name, edit):
    return files | {name: edit(files[name].copy())}


def put(value, *at):
    def edit(array):
        array[at] = value
        return array

    return edit


def without(files, name):
    return {own: value for own, value in files.items() if own != name}


def of_layer_1(files, edit):
    return {name: edit(value) if "1.mlp.experts.gate_up" in name else value for name, value in files.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: spoiled(t, SCALES, put(255, 2, 7, 1)), r"has the scale 255 at \[2, 7, 1\], which is no number \(NaN\)"),
        (lambda t: spoiled(t, SCALES, put(254, 0, 4, 0)), r"has the scale 254 at \[0, 4, 0\], 2\^127, under which a weight is infinite"),
        (lambda t: without(t, SCALES), rf"gate_up_proj_blocks' is of MXFP4, and '{SCALES}' is missing: download"),
        (lambda t: without(t, DOWN.format(1) + "_blocks"), r"down_proj_scales' is of MXFP4, and '\S+down_proj_blocks' is missing"),
        (lambda t: spoiled(t, SCALES, lambda a: a[:, :, :1]), r"_scales' has shape \[4, 192, 1\], expected \[4, 192, 2\]: as many as"),
        (lambda t: spoiled(t, SCALES, lambda a: a.astype(np.float32)), r"_scales' is float32: expected uint8, as MXFP4 is stored"),
        (lambda t: spoiled(t, BLOCKS, lambda a: a.reshape(4, 192, 32)), r"\[4, 192, 32\], expected \[experts, rows, blocks, 16\]"),
        (lambda t: of_layer_1(t, lambda a: a[:3]), r"gate_up_proj' is of 3 experts, expected 4 by its config\.json"),
        (lambda t: of_layer_1(t, lambda a: a[:, :-2]), r"_blocks' has shape \[95, 64\], expected \[96, 64\] by its config\.json"),
        (
            lambda t: t | {name.replace("1.", "7."): value for name, value in t.items() if "1.mlp.experts.gate_up" in name},
            r"7\.mlp\.experts\.gate_up_proj' has no place in a Qwen3-MoE of 2 layers",
        ),
    ],
)
def test_what_is_wrong_with_the_files(change, message, written, tmp_path):
    folder, files, _ = written
    save_file({name: np.ascontiguousarray(value) for name, value in change(files).items()}, str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match=rf"model\.safetensors: .*{message}"):
        loaded(tmp_path)


def test_config_json_and_files_have_to_agree(written, tmp_path):
    folder, files, meant = written
    save_file(files, str(tmp_path / "model.safetensors"))
    content = json.loads((folder / "config.json").read_text())
    without = {name: value for name, value in content.items() if name != "quantization_config"}
    (tmp_path / "config.json").write_text(json.dumps(without))
    with pytest.raises(UserError, match=r"gate_up_proj_blocks' is in MXFP4, and config\.json has no quantization_config that says so"):
        loaded(tmp_path)
    in_numbers(folder, files, meant, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"gate_proj\.weight' is float32, and by quantization_config in config\.json it is in MXFP4"):
        loaded(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SIZES.to_hub_config() | {"quantization_config": QUANTIZATION}))
    with pytest.raises(UserError, match=r"quantization_config\.quant_method = \"mxfp4\" \(expected \"bitsandbytes\"\)"):
        loaded(tmp_path)


def test_an_override_does_not_make_experts_of_another_kind():
    with pytest.raises(ValueError, match=r"overrides\.expert_format is no field of the architecture"):
        Experiment.model_validate(
            {
                "name": "a", "model": {"preset": "qwen3-moe-tiny", "overrides": {"expert_format": "mxfp4"}},
                "data": {"row_tokens": 16}, "training": {"steps": 1},
            }
        )  # fmt: skip


def test_of_random_weights_the_experts_are_quantized():
    """A preset whose checkpoint is in MXFP4, without its files."""
    model = build(CONFIG.replace(expert_format="mxfp4"), adapter=LoRAConfig(rank=2), key=jax.random.key(0))
    value = model.layers.moe.w1.weight.get_value()
    assert value.kind == "mxfp4" and 0.01 < float(jnp.std(value.dequantize(jnp.float32))) < 0.03
    drawn = value.random(jax.random.key(1)).dequantize(jnp.float32)
    assert bool(jnp.isfinite(drawn).all()) and 0.01 < float(jnp.std(drawn)) < 0.03
