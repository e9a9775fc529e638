"""Frozen weights in the host's memory: the same numbers to the bit, wherever they lie; what is refused, and before what."""

import re
import signal
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from pydantic import ValidationError
from support import ROOT, TINY
from test_loop import adapter, folder_of, losses, stop_at

import moejax
from moejax import device
from moejax.data.batching import assemble, stack, synthetic
from moejax.errors import UserError
from moejax.evaluation.generate import generate
from moejax.hub import quantized_cache, weights
from moejax.hub.model import create_model, model_arguments
from moejax.hub.weights import load_weights, read_config
from moejax.models.build import build, random_weights
from moejax.models.config import Quantization
from moejax.models.layers import Placement
from moejax.models.ops import host
from moejax.training import loop, oracle, placement, start
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
    "xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False, "xla_cpu_use_fusion_emitters": True
}  # fmt: skip
"""In the place of what makes the tests' compiler quick: with that, a sum's order is another in another program."""
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
    def compiled(self, lowering, options):
        return lowering.compile(compiler_options=AS_FOR_A_USER)

    monkeypatch.setattr(TrainProgram, "_compiled", compiled)
    there, none = results(make_experiment(**RANDOM | sections))
    here, held = results(make_experiment(**RANDOM | sections, placement=HOST))
    assert none == 0 < held
    jax.tree.map(np.testing.assert_array_equal, here, there)


@pytest.mark.parametrize("prefetch", ["experts", pytest.param("layer", marks=pytest.mark.long)])
def test_what_comes_ahead_is_what_is_used(prefetch, make_experiment):
    """As on a GPU. It is another program: a CPU's compiler may sum up in another order."""
    loop_of = RANDOM | {"model": {"moe_backend": "loop"}}
    there, here = (results(make_experiment(**loop_of, placement=p))[0] for p in ({}, HOST | {"prefetch": prefetch}))
    assert here[3] == there[3]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9), here, there)


def test_a_run_with_them_that_was_stopped_goes_on_to_the_bit(make_experiment, monkeypatch, capsys):
    training = {"steps": 6}
    straight, halves = (make_experiment(name, training=training, placement=HOST) for name in ("straight", "halves"))
    assert loop.run(straight, resume=False) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert loop.run(halves, resume=False) == 128 + signal.SIGTERM
    assert re.search(r"placement: 0\.00 GB of .* available in the host's pinned memory", capsys.readouterr().out)
    assert loop.run(halves, resume=True) == 0
    assert losses(folder_of(halves)) == losses(folder_of(straight)) and adapter(folder_of(halves)) == adapter(folder_of(straight))


@pytest.mark.parametrize("quantization", [Quantization(), None], ids=["4 bits", "bf16"])
def test_weights_are_read_straight_into_the_hosts_memory(quantization, tmp_path, monkeypatch):
    """From the checkpoint and from the cache; what lies there is what the device would hold, and nothing of it is made on the device."""
    folder = ROOT / "assets/tiny-mixtral"
    sizes, key = read_config(folder), jax.random.key(0)

    def loaded(where, cache=None):
        model = build(sizes, quantization=quantization or Quantization(modules=()), placement=Placement(where, where))
        return nnx.to_flat_state(nnx.state(load_weights(model, folder, key, cache=cache)))

    expected = loaded("device")
    monkeypatch.setattr(quantized_cache, "put", None)  # an array is filled on the device: no table and no codes are
    made = []
    real = host.empty
    monkeypatch.setattr(host, "empty", lambda shape, dtype: made.append(shape) or real(shape, dtype))
    for _ in range(2 if quantization else 1):
        found = loaded("host", tmp_path)
        for (path, ours), (_, theirs) in zip(found, expected, strict=True):
            jax.tree.map(np.testing.assert_array_equal, ours.get_value(), theirs.get_value())
            assert bool(host.nbytes(ours.get_value())) == (path[0] in ("embed", "head") or path[-2] in ("w1", "w2", "w3"))


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
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(platform="gpu")])
    monkeypatch.setattr(device, "this_machine", lambda fraction: None)
    for peak, chosen in ((970, "device"), (971, "host")):  # 3 % stay free, as of `training.remat: auto`
        monkeypatch.setattr(oracle.Oracle, "peak_bytes", lambda self, rows, peak=peak: peak)
        assert placement.resolve(experiment, sizes, 3).placement.experts == chosen
        assert f"placement.experts: {chosen} (on the device: 0.0 of 0.0 GB)" in capsys.readouterr().out


def test_random_weights_lie_where_they_are_to_lie(make_experiment):
    experiment = make_experiment(**RANDOM, placement=HOST)
    abstract = build(experiment.model.architecture(None), **model_arguments(experiment))
    assert host.nbytes(nnx.state(random_weights(abstract, jax.random.key(0)))) == host.nbytes(nnx.state(abstract)) > 0


def test_what_cannot_lie_there_is_refused(make_experiment):
    with pytest.raises(ValidationError, match=r"placement\.experts = host: only frozen weights can lie in the host's memory"):
        make_experiment(adapter=None, quantization={"format": "none"}, placement={"experts": "host"})
    with pytest.raises(ValidationError, match=r"placement\.prefetch = experts: model\.moe_backend = capacity multiplies a layer at once"):
        make_experiment(model={"moe_backend": "capacity"}, placement=HOST | {"prefetch": "experts"})


def test_the_hosts_memory_is_asked_before_anything_is_loaded(make_experiment, monkeypatch):
    monkeypatch.setattr(start, "read_data", None)
    monkeypatch.setattr(device, "host_bytes", lambda: (2_000, 1_000))
    with pytest.raises(UserError, match=r"placement: 0.00 GB of weights are to lie in the host's memory, and the system has 0.00 GB of"):
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
