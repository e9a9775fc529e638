"""`training.remat: auto` becomes one policy, early, and everyone else refuses it."""

import json
import re
import sys
from functools import partial

import jax
import numpy as np
import optax
import pytest
import yaml
from on_mesh import batch_of
from support import ROOT, loss_and_gradients

from moejax.errors import UserError
from moejax.estimator import closed_form
from moejax.hub.model import create_model
from moejax.models import decoder
from moejax.models.build import build
from moejax.models.config import PRESETS
from moejax.models.layers import REMAT_POLICIES
from moejax.training import loop, oracle, remat
from moejax.training.program import Own, TrainProgram, split

sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "pytorch")]

import contract  # noqa: E402
import handover  # noqa: E402

SIZES = PRESETS["mixtral-tiny"]


@pytest.fixture
def peaks(monkeypatch, tmp_path):
    """Compiled peaks of our choosing: peaks({"none": bytes, …}) -> the policies that were asked for, in order."""
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "cache"))

    def play(table, limit, closed=0):
        asked = []

        def peak_bytes(self, rows):
            assert self.gpu.usable_bytes and rows == self.experiment.data.batch_rows
            asked.append(self.experiment.training.remat)
            return int(table[asked[-1]])

        monkeypatch.setattr(oracle.Oracle, "peak_bytes", peak_bytes)
        monkeypatch.setattr(oracle.Oracle, "breakdown", lambda self, rows: type("Told", (), {"total": int(closed)}))
        monkeypatch.setattr(remat.device, "usable_bytes", lambda: None if limit is None else int(limit))
        return asked

    return play


@pytest.mark.parametrize(
    ("limit", "closed", "chosen", "asked", "said"),
    [
        (100e9, 80e9, "none", ["none"], "none (none: 80.0 of 100.0 GB of the host's available memory)"),
        (81e9, 80e9, "dots", ["none", "dots"], "dots (none: 80.0, dots: 50.0 of 81.0 GB"),  # 80 of 81 leaves less than the reserve
        (60e9, 80e9, "dots", ["dots"], "dots (none: about 80.0 by arithmetic, dots: 50.0 of 60.0 GB"),
        (30e9, 80e9, "full", ["dots"], "full (none: about 80.0 by arithmetic, dots: 50.0 of 30.0 GB"),
        (None, 80e9, "full", [], "full (how much memory there is is not known here)"),
    ],
)
def test_the_cheapest_that_fits(limit, closed, chosen, asked, said, peaks, make_experiment, capsys):
    seen = peaks({"none": 80e9, "dots": 50e9}, limit, closed)
    experiment = make_experiment(training={"remat": "auto"})
    resolved = remat.resolve(experiment, SIZES, 20)
    assert resolved.training.remat == chosen and seen == asked
    assert f"training.remat: {said}" in capsys.readouterr().out
    assert resolved == experiment.changed("training", remat=chosen)


def test_a_named_policy_is_left_alone(peaks, make_experiment):
    seen = peaks({}, 1)
    experiment = make_experiment(training={"remat": "none"})
    assert remat.resolve(experiment, SIZES, 20) is experiment and not seen


def test_a_run_keeps_its_choice_and_resumes_with_it(make_experiment, monkeypatch, tmp_path, capsys):
    """With real figures of this machine; the second start has another memory, and goes on with the program it began with."""
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remat.device, "usable_bytes", lambda: 10**12)
    training = {"remat": "auto", "steps": 2, "gradient_accumulation": 1}
    experiment = make_experiment(training=training, profile={"start_step": 2, "steps": 1})
    assert loop.run(experiment, resume=False) == 0
    assert "training.remat: none (none: 0.0 of 1000.0 GB" in capsys.readouterr().out
    folder = tmp_path / "runs" / "run"
    assert yaml.safe_load((folder / "config.yaml").read_text())["training"]["remat"] == "none"
    assert json.loads((folder / "step_profile.json").read_text())["remat"] == "none"
    monkeypatch.setattr(remat.device, "usable_bytes", lambda: 10)
    assert remat.of_run(experiment).training.remat == "none"
    with monkeypatch.context() as patch:
        patch.setattr(TrainProgram, "compile_within", lambda self, rows, row_tokens, limit: self.compile(rows, row_tokens))
        assert loop.run(experiment, resume=True) == 0


def instructions(text):
    """A module without what tells where in the source it comes from, which is no part of the cache's key either."""
    lines = [line for line in text.splitlines() if " = " in line or line.startswith("HloModule")]
    return [re.sub(r", metadata=\{[^}]*\}", "", line) for line in lines]


def test_the_program_asked_about_is_the_one_that_runs(make_experiment, tmp_path, monkeypatch):
    """Or the choice would be compiled twice, and its figure be another program's."""
    experiment = make_experiment(training={"remat": "none", "steps": 3, "gradient_accumulation": 2})
    texts = []
    step = TrainProgram.step

    def keep(self, batch):
        texts.extend(c.executable.as_text() for c in self.compiled.values())
        return step(self, batch)

    monkeypatch.setattr(TrainProgram, "step", keep)
    assert loop.run(experiment, resume=False) == 0
    architecture = experiment.model.architecture(None)
    asked = TrainProgram(experiment, architecture).compile(experiment.data.batch_rows, 64)
    assert instructions(asked.executable.as_text()) == instructions(texts[0])


def test_others_refuse_auto(make_experiment, tmp_path):
    experiment = make_experiment(training={"remat": "auto"}, model={"aux_loss_coef": 0.0})
    with pytest.raises(UserError, match=r"training\.remat = auto is resolved by a training run only: set none, dots, full or offload"):
        TrainProgram(experiment, SIZES).compile(1, 8)
    for policy in ("auto", "dots"):
        other = experiment.changed("training", remat=policy)
        with pytest.raises(UserError, match=f"remat = {policy}: the closed form knows none, full and offload"):
            closed_form.breakdown(other, SIZES, rows=1, row_tokens=8, platform="cpu")
        with pytest.raises(UserError, match=f"remat = {policy}: PyTorch's side cannot express it"):
            handover.write_random(other, tmp_path, stack_name="study")
        content = {"experiment": other.model_dump(mode="json"), "hub_config": SIZES.to_hub_config()}
        with pytest.raises(contract.CannotRun, match=f"remat = {policy}: PyTorch's side cannot express it"):
            contract.check(content, "study")


def test_policies_agree(reference_batch, reference_config):
    """Loss and gradients under `dots` are those under `none`: what is computed again is computed alike. `offload` is `full` to the bit."""
    import jax
    import numpy as np

    model = build(reference_config, key=jax.random.key(0), dtype="float32")
    results = [loss_and_gradients(model, reference_batch, remat=policy) for policy in ("none", "dots", "full", "offload")]
    for a, b in zip(*(jax.tree.leaves(r[2]) for r in results[:2]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)
    assert np.isclose(results[0][0], results[1][0], rtol=1e-6)
    for a, b in zip(*(jax.tree.leaves(r) for r in results[2:]), strict=True):  # the same program, but for where streams wait
        np.testing.assert_array_equal(a, b)


def test_offload_keeps_no_stream_on_the_device(reference_batch, reference_config):
    """What the backward pass waits for, [L, tokens, D], is in the host's memory: of the traced program, since a CPU's memories are one."""
    import jax
    from flax import nnx

    graphdef, trainable, frozen = split(build(reference_config, dtype="float32"), full=True)

    def streams(remat):
        """(on the device, in the host's memory)"""
        def loss(trainable):
            return jax.numpy.sum(nnx.merge(graphdef, trainable, frozen)(reference_batch.tokens, remat=remat)[0])

        text = str(jax.make_jaxpr(jax.grad(loss))(trainable))
        layers, rows, tokens = reference_config.num_layers, *reference_batch.tokens.shape
        (scan,) = {line for line in text.splitlines() if re.search(r"= scan\[", line) and "<host>" in line} or {text}
        shape = re.escape(f"[{layers},{rows},{tokens},{reference_config.hidden_size}]")
        return len(re.findall(rf"f32{shape}", scan)), len(re.findall(rf"f32<host>{shape}", scan))

    assert streams("offload")[1] == 2 and streams("offload")[0] == 0 < streams("full")[0] and streams("full")[1] == 0


def test_auto_ends_with_the_host_where_a_device_has_two_memories(peaks, make_experiment, monkeypatch, capsys):
    seen = peaks({"dots": 50e9, "full": 40e9}, 30e9, closed=80e9)
    monkeypatch.setattr(remat, "policies", lambda: REMAT_POLICIES)
    experiment = make_experiment(training={"remat": "auto"})
    assert remat.resolve(experiment, SIZES, 20).training.remat == "offload" and seen == ["dots", "full"]
    assert "training.remat: offload (none: about 80.0 by arithmetic, dots: 50.0, full: 40.0 of 30.0 GB" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes", [{}, pytest.param({"accumulation": "layer_major"}, marks=pytest.mark.long)], ids=["micro_batch_major", "layer_major"]
)
def test_a_gpus_order_of_the_backward_pass_changes_no_gradient(changes, make_experiment, monkeypatch):
    """Its barriers, and its gradients that go to the sums half by half, on this CPU: one step of two micro-batches."""
    experiment = make_experiment(
        training={"remat": "full", "gradient_accumulation": 2} | changes, data={"source": None, "batching": "fixed", "holdout": 0},
        tokenizer=None,
    )  # fmt: skip
    sizes = experiment.model.architecture(None)
    batch = batch_of(2, 16, 2, sizes.vocab_size)
    found = {}
    for lean in (False, True):
        monkeypatch.setattr(decoder, "lean", lambda platform, lean=lean: lean)
        program = TrainProgram(experiment, sizes, own=Own(optax.sgd(1.0)))
        program.load(create_model(experiment, sizes, None))
        metrics = program.step(batch)
        found[lean] = jax.device_get((metrics["loss"], metrics["grad_norm"], program.state.trainable))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-7), found[True], found[False])
