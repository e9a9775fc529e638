"""A step compiled for this machine and its state, and what is said where that fails (for GPUs: test_gpu_compile.py)."""

import jax
import pytest
from support import ROOT

from moejax import config
from moejax.data.batching import assemble, stack, synthetic
from moejax.errors import UserError
from moejax.hub.model import create_model
from moejax.models.config import PRESETS
from moejax.training import absent, program
from moejax.training.program import TrainProgram

EXPERIMENT = config.load(ROOT / "configs" / "mixtral_8x7b_cs_sparse.yaml")


def test_the_step_compiles_for_this_machine():
    compiled = TrainProgram(EXPERIMENT, PRESETS["mixtral-tiny"]).compile(2, 64)
    assert compiled.peak_bytes > compiled.argument_bytes > 0


def test_unknown_gpu():
    with pytest.raises(UserError, match=r"'H1000' is unknown here: expected one of .*H100"):
        absent.device("H1000")


def test_it_is_shapes_until_weights_are_loaded_and_goes_on_from_its_own_state(make_experiment):
    """The same program before and after; its state is what the steps made of it, and so is the model."""
    experiment = make_experiment(data={"source": None, "batching": "fixed", "holdout": 0}, tokenizer=None)
    sizes = experiment.model.architecture(None)
    step = TrainProgram(experiment, sizes)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((step.state, step.frozen)))
    compiled = step.compile(4, 64)
    assert (step.peak_bytes, step.compile_seconds) == (compiled.peak_bytes, compiled.seconds)
    step.load(create_model(experiment, sizes, None))
    rows = [[query] for query in synthetic(experiment.data, sizes.vocab_size, 0, 4)]
    micro = assemble(rows, 4, 64)
    before, tokens = step.evaluate(micro)
    assert tokens == micro.loss_mask.sum()
    losses = [float(step.step(stack([micro, micro], 2))["loss"]) for _ in range(3)]
    assert step.compile(4, 64) is compiled and int(step.state.step) == 3
    assert losses[0] == pytest.approx(before["loss"] / tokens, rel=1e-6) and losses[2] < losses[1] < losses[0]
    again = TrainProgram(experiment, sizes)
    again.load(step.model())
    assert again.evaluate(micro) == step.evaluate(micro) != (before, tokens)


def test_what_would_fit_is_said(make_experiment):
    experiment = make_experiment(model={"experts_per_token": 4}, adapter={"targets": ["q_proj"]})  # dense: the smallest program
    step = TrainProgram(experiment, experiment.model.architecture(None))
    two, eight = (step.compile(rows, 64).peak_bytes for rows in (2, 8))
    assert step.compile_within(8, 64, None) is step.compile_within(8, 64, eight) is step.compile(8, 64)
    with pytest.raises(UserError, match=r"with 8 rows, .* data\.batch_rows=[2-7] would fit"):
        step.compile_within(8, 64, (two + eight) // 2)
    with pytest.raises(UserError, match=r"with 1 row, .*not even one row fits"):
        step.compile_within(1, 64, 1)


@pytest.mark.parametrize(
    ("message", "advice"),
    [("INTERNAL: Couldn't find output tile sizes that satisfy hlo: %dot\nmore", "rows of a multiple of 16 tokens"),
     ("RESOURCE_EXHAUSTED: Out of memory while compiling", "fewer rows (data.batch_rows)"),
     ("NOT_FOUND: Couldn't find a suitable version of ptxas", "the compiler's own tools"),
     ("UNIMPLEMENTED: custom call", "report the message")],
)  # fmt: skip
def test_a_compile_that_fails_is_one_message(message, advice, monkeypatch):
    def refuse(lowering, options=None):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(program, "compile_profiled", refuse)
    with pytest.raises(UserError) as told:
        TrainProgram(EXPERIMENT, PRESETS["mixtral-tiny"], traced=True).compile(2, 64)
    said = str(told.value)
    assert said.startswith("the step of mixtral_8x7b_cs_sparse (2 rows x 64 tokens) does not compile for cpu: " + message.splitlines()[0])
    assert advice in said and "\n" not in said
