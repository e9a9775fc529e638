"""Frozen weights in the host's memory: the same numbers to the bit, wherever they lie; what is refused, and before what."""

import os
import re
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from pydantic import ValidationError
from support import ROOT, TINY, tiny_experiments
from test_loop import adapter, folder_of, losses, stop_at

import moejax
from moejax import device
from moejax.data.batching import assemble, stack, synthetic
from moejax.errors import UserError
from moejax.estimator import placing
from moejax.evaluation.generate import generate
from moejax.hub import buffers, weights
from moejax.hub.model import create_model, model_arguments
from moejax.hub.weights import load_weights, read_config
from moejax.models.build import build, random_weights
from moejax.models.config import Quantization
from moejax.models.layers import Placement
from moejax.models.ops import host
from moejax.models.ops.split import Split
from moejax.training import loop, oracle, placement, remat, start
from moejax.training.program import Own, TrainProgram

HOST = {"experts": "host", "tables": "host"}
RANDOM = {"data": {"source": None, "batching": "fixed", "holdout": 0}, "tokenizer": None}


def results(experiment):
    """What a step, an evaluation and answers give, and the bytes that were in the host's memory. The step takes the gradients as they are:
    two programs may round AdamW's products in two ways."""
    sizes = experiment.model.architecture(None)
    program = TrainProgram(experiment, sizes, own=Own(optax.sgd(1.0)))
    program.load(create_model(experiment, sizes, None))
    micro = assemble([[query] for query in synthetic(experiment.data, sizes.vocab_size, 0, 2)], 2, 64)
    evaluated = program.evaluate(micro)
    metrics = jax.device_get(program.step(stack([micro, micro], 2)))
    answers = generate(program.model(), [[1, 2, 3], [7]], max_new_tokens=4, end=2)
    return (metrics, jax.device_get(program.state), evaluated, answers), program.compile(2, 64).host_bytes


AS_FOR_A_USER = {
    name: value
    for name, value in (
        ("xla_backend_optimization_level", 3), ("xla_llvm_disable_expensive_passes", False), ("xla_cpu_use_fusion_emitters", True)
    )
    if name in os.environ["XLA_FLAGS"]
}  # fmt: skip
"""In the place of what makes the tests' compiler quick: with that, a sum's order is another in another program."""


def compiled_as_for_a_user(self, lowering, options):
    return lowering.compile(compiler_options=AS_FOR_A_USER)


MANY = TINY | {"num_experts": 16, "experts_per_token": 4}


@pytest.mark.parametrize(
    "sections",
    [pytest.param({"model": {"moe_backend": "loop"}}, marks=pytest.mark.long),
     pytest.param({"model": {"moe_backend": "capacity", "overrides": MANY}}, marks=pytest.mark.long),
     pytest.param({"quantization": {"format": "none"}, "training": {"remat": "none"}}, marks=pytest.mark.long),
     pytest.param({"model": {"experts_per_token": 4}}, marks=pytest.mark.long),
     pytest.param({"training": {"accumulation": "layer_major"}}, marks=pytest.mark.long)],
    ids=["loop", "capacity", "not quantized", "dense", "layer_major"],
)  # fmt: skip
def test_the_numbers_are_the_same_to_the_bit(sections, make_experiment, monkeypatch):
    monkeypatch.setattr(TrainProgram, "_compiled", compiled_as_for_a_user)
    there, none = results(make_experiment(**RANDOM | sections))
    here, held = results(make_experiment(**RANDOM | sections, placement=HOST))
    assert none == 0 < held
    jax.tree.map(np.testing.assert_array_equal, here, there)


LOOP = RANDOM | {"model": {"moe_backend": "loop"}}


@pytest.fixture(scope="module")
def on_the_device(tmp_path_factory):
    return results(tiny_experiments(tmp_path_factory.mktemp("device"))(**LOOP))


@pytest.mark.parametrize("prefetch", ["experts", pytest.param("layer", marks=pytest.mark.long)])
def test_what_comes_ahead_is_what_is_used(prefetch, make_experiment, on_the_device):
    """As on a GPU. It is another program: a CPU's compiler may sum up in another order."""
    there, here = on_the_device[0], results(make_experiment(**LOOP, placement=HOST | {"prefetch": prefetch}))[0]
    assert here[3] == there[3]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9), here, there)


DEEP = {"overrides": TINY | {"num_layers": 5}}
QWEN3 = {"preset": "qwen3-moe-tiny", "overrides": TINY | {"num_layers": 4}}


@pytest.mark.long
@pytest.mark.parametrize(
    "sections",
    [{"model": DEEP}, {"model": DEEP, "training": {"accumulation": "layer_major", "remat": "none"}},
     {"model": DEEP | {"moe_backend": "capacity"}, "training": {"remat": "offload"}}, {"model": QWEN3, "adapter": {"dropout": 0.1}}],
    ids=["sums", "layer_major", "capacity, offload", "qwen3, dropout"],
)  # fmt: skip
def test_of_some_layers_the_same_to_the_bit(sections, make_experiment, monkeypatch):
    """The experts of two layers on the device, of the others in the host's memory: gradients, evaluation, answers."""
    monkeypatch.setattr(TrainProgram, "_compiled", compiled_as_for_a_user)
    (there, none), (here, held) = (results(make_experiment(**RANDOM | sections, placement=p)) for p in ({}, {"experts": 2}))
    assert none == 0 < held
    jax.tree.map(np.testing.assert_array_equal, here, there)


def test_of_some_layers(make_experiment, on_the_device):
    """Each scan of one layer: a program that sums up in another order."""
    there, here = on_the_device, results(make_experiment(**LOOP, placement={"experts": 1}))
    assert there[1] == 0 < here[1] and here[0][3] == there[0][3]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9), here[0], there[0])


@pytest.mark.long  # frozen weights are in no checkpoint, wherever they lie: test_loop.py resumes a run
def test_a_run_with_them_that_was_stopped_goes_on_to_the_bit(make_experiment, monkeypatch, capsys):
    training = {"steps": 6}
    straight, halves = (make_experiment(name, training=training, placement=HOST) for name in ("straight", "halves"))
    assert loop.run(straight, resume=False) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert loop.run(halves, resume=False) == 128 + signal.SIGTERM
    assert re.search(r"placement: 0\.\d+ MB of .* available in the host's pinned memory", capsys.readouterr().out)
    assert loop.run(halves, resume=True) == 0
    assert losses(folder_of(halves)) == losses(folder_of(straight)) and adapter(folder_of(halves)) == adapter(folder_of(straight))


@pytest.mark.long
def test_a_run_goes_on_with_another_placement_and_auto_with_its_own(make_experiment, monkeypatch, capsys):
    begun = make_experiment(training={"steps": 3}, placement={"experts": 1})
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert loop.run(begun, resume=False) == 128 + signal.SIGTERM
    assert remat.of_run(begun.changed("placement", experts="auto")).placement.experts == 1
    assert loop.run(begun.changed("placement", experts="host"), resume=True) == 0
    told = capsys.readouterr().out
    assert "experts of 1 of 2 layers on the device, 1 in host memory: " in told and "experts of 0 of 2 layers" in told
    assert "0.00 GB" not in told


@pytest.mark.parametrize("quantization", [Quantization(), None], ids=["4 bits", "bf16"])
def test_weights_are_read_straight_into_the_hosts_memory(quantization, tmp_path, monkeypatch):
    """From the checkpoint and from the cache; what lies there is what the device would hold, and nothing of it is made on the device."""
    folder = ROOT / "assets/tiny-mixtral"
    sizes, key = read_config(folder), jax.random.key(0)

    def loaded(where, cache=None):
        tables = "device" if where == "device" else "host"
        model = build(sizes, quantization=quantization or Quantization(modules=()), placement=Placement(where, tables))
        return nnx.to_flat_state(nnx.state(load_weights(model, folder, key, cache=cache)))

    expected = loaded("device")
    filled, put = [], buffers._put
    monkeypatch.setattr(buffers, "_put", lambda array, *more: filled.append(array.ndim) or put(array, *more))
    made = []
    real = host.empty
    monkeypatch.setattr(host, "empty", lambda shape, dtype, device: made.append(shape) or real(shape, dtype, device))
    for _ in range(2 if quantization else 1):
        found = loaded("host", tmp_path)
        for (path, ours), (_, theirs) in zip(found, expected, strict=True):
            jax.tree.map(np.testing.assert_array_equal, ours.get_value(), theirs.get_value())
            assert bool(host.nbytes(ours.get_value())) == (path[0] in ("embed", "head") or path[-2] in ("w1", "w2", "w3"))
        assert max(filled) == 3  # none of experts: [layers, experts, rows, columns]


@pytest.mark.parametrize("quantization", [Quantization(), None], ids=["4 bits", "bf16"])
def test_a_layers_weights_are_read_to_its_place(quantization, tmp_path):
    """Of four layers the last one's experts go to the host's memory; no cache is made again for them."""
    folder = ROOT / "assets/tiny-mixtral"
    sizes, key = read_config(folder), jax.random.key(0)

    def abstract(where):
        return build(sizes, quantization=quantization or Quantization(modules=()), placement=Placement(where))

    def loaded(where):
        return load_weights(abstract(where), folder, key, cache=tmp_path)

    expected = nnx.to_flat_state(nnx.state(loaded("device")))
    files = sorted(tmp_path.iterdir())
    for _ in range(2):
        model = loaded(3)
        for (_, ours), (_, theirs) in zip(nnx.to_flat_state(nnx.state(model)), expected, strict=True):
            value = ours.get_value()
            pieces = value.pieces if isinstance(value, Split) else (value,)
            assert len(pieces) == 1 or ((host.nbytes(pieces[0]), pieces[0].shape[0]) == (0, 3) and host.nbytes(pieces[1]))
            whole = jax.tree.map(lambda *parts: np.concatenate(parts) if len(parts) > 1 else parts[0], *pieces)
            jax.tree.map(np.testing.assert_array_equal, whole, theirs.get_value())
        assert sorted(tmp_path.iterdir()) == files
    assert 4 * host.nbytes(nnx.state(model)) == host.nbytes(nnx.state(abstract("host"))) > 0
    assert weights.report(model) == weights.report(abstract("device"))


def test_moejax_load(monkeypatch):
    """A model that is asked, wherever it lies; more of it than the system has is refused before it is read."""
    models = [moejax.load(ROOT / "assets/tiny-mixtral", quantization="nf4", placement=p) for p in (None, HOST)]
    assert [host.nbytes(nnx.state(m.model)) > 0 for m in models] == [False, True]
    there, here = (m.generate("Tom has 3 apples.", max_new_tokens=4) for m in models)
    assert here == there
    monkeypatch.setattr(device, "host_bytes", lambda: (2_000, 1_000))
    monkeypatch.setattr(weights, "load_weights", None)
    with pytest.raises(UserError, match="are to lie in the host's memory"):
        moejax.load(ROOT / "assets/tiny-mixtral", placement=HOST)


def test_auto_is_the_device_where_the_step_fits(make_experiment, monkeypatch, capsys):
    experiment = make_experiment(placement={"experts": "auto"})
    sizes = experiment.model.architecture(None)
    assert placement.resolve(experiment, sizes, 3).placement.experts == "device"  # a CPU has one memory
    monkeypatch.setattr(device, "usable_bytes", lambda: 1_000)
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(platform="gpu", device_kind="NVIDIA L4")])
    monkeypatch.setattr(device, "this_machine", lambda fraction: None)
    for peak, chosen in ((970, "device"), (971, "host")):  # 3 % stay free, as of `training.remat: auto`
        monkeypatch.setattr(oracle.Oracle, "peak_bytes", lambda self, rows, peak=peak: peak)
        assert placement.resolve(experiment, sizes, 3).placement.experts == chosen
        assert f"placement.experts: {chosen} (device: 0.0" in capsys.readouterr().out


def test_auto_is_as_many_layers_as_fit(make_experiment, monkeypatch, capsys):
    experiment = make_experiment(model={"preset": "mixtral-8x7b", "overrides": {}}, placement={"experts": "auto"})
    sizes, asked = experiment.model.architecture(None), []
    of_layer = placing.expert_bytes(experiment, sizes) / 32
    card = SimpleNamespace(memory_gb=24, pcie=4, pcie_lanes=16)
    monkeypatch.setattr(device, "usable_bytes", lambda: 22e9)
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(platform="gpu", device_kind="NVIDIA L4")])
    monkeypatch.setattr(device, "this_machine", lambda fraction: card)

    def peak_bytes(self, rows):
        """2.5 GB next to the experts, and two experts' codes where any are fetched."""
        n = self.experiment.placement.on_device(32)
        asked.append(n)
        return int(2.5e9 + n * of_layer + (n < 32) * of_layer / 4)

    monkeypatch.setattr(oracle.Oracle, "peak_bytes", peak_bytes)
    chosen = placement.resolve(experiment, sizes, 3)
    n = chosen.placement.experts
    assert 0.97 * 22e9 - of_layer < peak_bytes(SimpleNamespace(experiment=chosen), 1) <= 0.97 * 22e9 and asked[0] == 32 and len(asked) < 5
    assert f"placement.experts: {n} (device: 25.8, {n}: " in capsys.readouterr().out
    held = (32 - n) * of_layer / 1e9
    (line,) = placement.announce(chosen, sizes)
    assert f"{n} of 32 layers on the device, {32 - n} in host memory: {held:.2f} GB, fetched 4 x {held:.2f} GB a step over PCIe 4" in line


@pytest.mark.parametrize(("beside", "buffers"), [(0, 0), (3, 0), (3, 7), (3, 25), (9, 95), (70, 0), (95, 8), (200, 9)])
@pytest.mark.parametrize("limit", [100, 150, 299])
def test_the_most_layers_are_found_in_four_compiles(beside, buffers, limit):
    """Of 20 layers of 10 each; next to: what is never fetched; buffers: of what is."""
    asked = []

    def peak_bytes(n):
        asked.append(n)
        return beside + 10 * n + (buffers if n < 20 else 0)

    found = placing.most_layers(peak_bytes, 20, 10, limit)
    assert len(asked) <= 4 and found == max((n for n in range(1, 21) if peak_bytes(n) <= limit), default=0)


def test_random_weights_lie_where_they_are_to_lie(make_experiment):
    for place in (HOST, {"experts": 1}):
        experiment = make_experiment(**RANDOM, placement=place)
        abstract = build(experiment.model.architecture(None), **model_arguments(experiment))
        assert host.nbytes(nnx.state(random_weights(abstract, jax.random.key(0)))) == host.nbytes(nnx.state(abstract)) > 0


def test_what_cannot_lie_there_is_refused(make_experiment):
    with pytest.raises(ValidationError, match=r"placement\.experts = host: only frozen weights can lie in the host's memory"):
        make_experiment(adapter=None, quantization={"format": "none"}, placement={"experts": "host"})
    with pytest.raises(ValidationError, match=r"placement\.prefetch = experts: model\.moe_backend = capacity multiplies a layer at once"):
        make_experiment(model={"moe_backend": "capacity"}, placement=HOST | {"prefetch": "experts"})
    with pytest.raises(ValidationError, match=r"placement\.experts = 3: layers with experts: 2; expected a number from 0 \(host\) to 2"):
        make_experiment(placement={"experts": 3})
    with pytest.raises(ValidationError, match=r"placement\.experts = 1: only frozen weights"):
        make_experiment(adapter=None, quantization={"format": "none"}, placement={"experts": 1})


def test_the_hosts_memory_is_asked_before_anything_is_loaded(make_experiment, monkeypatch):
    monkeypatch.setattr(start, "read_data", None)
    monkeypatch.setattr(device, "host_bytes", lambda: (2_000, 1_000))
    with pytest.raises(UserError, match=r"placement: 0\.\d+ MB of weights are to lie in the host's memory, and the system has 0.001 MB of"):
        loop.run(make_experiment(placement=HOST), resume=False)


def test_a_device_without_pinned_memory_is_refused(make_experiment, monkeypatch):
    class Bare:
        device_kind = "Bare"

        def addressable_memories(self):
            return []

    monkeypatch.setattr(start, "read_data", None)
    monkeypatch.setattr(jax, "local_devices", lambda: [Bare()])
    with pytest.raises(UserError, match=r"placement.experts = host.*: Bare has no pinned host memory .*: set both to device"):
        model_arguments(make_experiment(placement=HOST))


@pytest.mark.parametrize("index", [2, (1, 3)])
def test_a_part_by_one_axis_is_the_part(index):
    """As a TPU fetches it: its compiler has slices along one axis alone."""
    array = host.put(jnp.arange(4 * 5 * 2 * 3, dtype=jnp.float32).reshape(4, 5, 2, 3))
    where = [jnp.int32(i) for i in (index if isinstance(index, tuple) else (index,))]
    found = jax.jit(host._by_one_axis)(array, where)
    assert not host.is_host(found) and np.array_equal(found, np.asarray(array)[index])


def test_a_row_by_its_tile_is_the_row():
    """As a TPU fetches rows of a table."""
    table = host.put(jnp.arange(24 * 3, dtype=jnp.float32).reshape(24, 3))
    found = jax.jit(jax.vmap(host._row_of_tile, (None, 0)))(np.asarray(table), jnp.array([0, 7, 8, 23]))
    assert np.array_equal(found, np.asarray(table)[[0, 7, 8, 23]])
