"""Steps whose numbers are wrong: reported with their batch, skipped or the end of the run."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.config import TrainingConfig
from moejax.data.batch import Batch
from moejax.errors import UserError
from moejax.training import loop
from moejax.training.optimizer import make_optimizer
from moejax.training.program import Own
from moejax.training.step import Objective, TrainState, make_train_step
from moejax.training.watch import BAD_IN_A_ROW, Watch

BATCH = Batch(*(np.full((1, 1, 4), i) for i in range(5)))
GOOD = {"loss": 1.0, "grad_norm": 1.0, "update_norm": 1.0, "param_norm": 1.0}


def watch(folder, on_bad_step="stop"):
    return Watch(folder, folder, SimpleNamespace(training=SimpleNamespace(on_bad_step=on_bad_step)))


@pytest.mark.parametrize("name", list(GOOD))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_stops_the_run(tmp_path, name, value):
    with pytest.raises(UserError, match=rf"step 3: {name} = {value}: not finite.*last good checkpoint is step 2"):
        watch(tmp_path).look(3, GOOD | {name: value}, BATCH, 2)
    with np.load(tmp_path / "bad_steps" / "step-3.npz") as kept:
        assert all(np.array_equal(kept[key], value) for key, value in BATCH._asdict().items())


def test_skipped_steps_are_counted_and_ten_in_a_row_end_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("moejax.training.watch.MOST_BATCHES", 5)
    looking, bad = watch(tmp_path, "skip"), GOOD | {"loss": float("nan"), "skipped": 1.0}
    for step in range(1, BAD_IN_A_ROW):
        looking.look(step, bad, BATCH, None)
    looking.look(BAD_IN_A_ROW, GOOD | {"skipped": 0.0}, BATCH, None)
    assert looking.conclude() == ["9 steps were skipped: their numbers were not finite"]
    with pytest.raises(UserError, match="the last of 10 one after the other"):
        for step in range(20, 20 + BAD_IN_A_ROW):
            looking.look(step, bad, BATCH, None)
    with pytest.raises(UserError, match="step 50: loss = nan"):
        looking.look(50, GOOD | {"loss": float("nan")}, BATCH, None)
    assert {p.name for p in (tmp_path / "bad_steps").iterdir()} == {f"step-{step}.npz" for step in (*range(1, 6), 50)}
    # A weight that is not finite was not skipped: it is the learning rate's doing.
    with pytest.raises(UserError, match="param_norm = inf"):
        watch(tmp_path, "skip").look(1, GOOD | {"param_norm": float("inf"), "skipped": 0.0}, BATCH, None)


def test_a_spike_and_a_rate_that_destroys_are_reported(tmp_path, capsys):
    looking = watch(tmp_path)
    for step in range(1, 31):
        looking.look(step, GOOD | {"loss": 2.6 + 0.01 * (step % 3)}, BATCH, None)
    assert looking.conclude() == [] and not (tmp_path / "bad_steps").exists()
    looking.look(31, GOOD | {"loss": 6.2}, BATCH, None)
    assert "step 31: loss 6.2000, 2.6" in capsys.readouterr().out and (tmp_path / "bad_steps" / "step-31.npz").is_file()
    for step in range(32, 45):
        looking.look(step, GOOD | {"loss": 6.2}, BATCH, None)
    assert looking.conclude()[0].startswith("the loss went up: 2.6")


@pytest.mark.parametrize(("update", "first", "steps", "told"), [(2e-6, 1, 30, 1), (1e-5, 1, 30, 0), (2e-6, 500, 30, 0), (2e-6, 1, 9, 0)])
def test_a_rate_that_does_nothing_is_reported(update, first, steps, told, tmp_path):
    looking = watch(tmp_path)
    for step in range(first, first + steps):
        looking.look(step, GOOD | {"update_norm": update}, BATCH, None)
    found = looking.conclude()
    assert len(found) == told and all(line.startswith("the learning rate did next to nothing: 30 steps moved") for line in found)
    assert not told or "by 6e-05 of their norm" in found[0]


@pytest.fixture
def one_step(monkeypatch):
    """one_step(loss of (weights, frozen), frozen, optimizer, weights=…, skip_bad=…) -> (state before, state after, metrics) of a step of a
    model that is a few weights."""

    def go(loss, frozen, optimizer, weights=None, skip_bad=False):
        def sums(objective, trainable, frozen, batch, key, gradient_sums=None):
            found = loss(trainable["w"], frozen)
            return found, ({"loss": found}, SimpleStats(jnp.zeros((1, 2))))

        monkeypatch.setattr("moejax.training.step.sums", sums)
        make = getattr(make_train_step, "__wrapped__", make_train_step)  # not the tests' shared ones: `sums` is another each time
        step = jax.jit(make(Objective(None, full=True, skip_bad=skip_bad), optimizer, None, 0))
        weights = {"w": jnp.ones((2, 4096)) if weights is None else weights}
        before = TrainState(weights, optimizer.init(weights), jnp.int32(0))
        return before, *step(before, jnp.float32(frozen), Batch(*(jnp.ones((1, 1, 4)) for _ in range(5))))

    return go


@pytest.mark.parametrize("factor", [1.0, float("nan")])
def test_a_bad_step_changes_no_weight_and_no_moment(one_step, factor):
    before, after, metrics = one_step(lambda w, x: jnp.sum(w**2) * x, factor, optax.adam(0.1), skip_bad=True)
    same = [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(after[:2]), jax.tree.leaves(before[:2]), strict=True)]
    assert (not any(same), metrics["skipped"]) == (True, 0.0) if factor == 1.0 else (all(same), metrics["skipped"]) == (True, 1.0)
    assert after.step == 1


ARISES = {
    "loss": (lambda w, x: jnp.sum(w) + x, np.nan, optax.sgd(1.0), 1.0),
    "grad_norm": (lambda w, x: jnp.sum(jnp.sqrt(w * x)), 0.0, optax.sgd(1.0), 1.0),  # the root's slope at zero
    "update_norm": (lambda w, x: jnp.sum(w * x), 1e10, optax.sgd(1e20), 1.0),
    "param_norm": (lambda w, x: jnp.sum(w * x), -1.0, optax.sgd(1e17), 2e17),
}
"""What is not finite -> (loss, frozen, optimizer, weights): in a step in which nothing before it is."""


@pytest.mark.parametrize("name", ARISES)
def test_what_is_not_finite_is_found_in_the_step_in_which_it_arises(one_step, tmp_path, name):
    loss, frozen, optimizer, weight = ARISES[name]
    _, _, metrics = one_step(loss, frozen, optimizer, jnp.full((2, 4096), weight))
    record = {key: float(metrics[key]) for key in GOOD}
    assert next(key for key in GOOD if not np.isfinite(record[key])) == name
    with pytest.raises(UserError, match=f"step 1: {name} = "):
        watch(tmp_path).look(1, record, BATCH, None)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adafactor", "lion"])
def test_moments_do_not_overflow_unseen(one_step, optimizer):
    """Whatever the gradient is: where a moment is not finite, a number that is looked at is not either."""
    config = TrainingConfig(steps=1, optimizer=optimizer, clip_norm=None)
    overflown = []
    for gradient in (1e17, 1e19, 3e38):
        _, after, metrics = one_step(lambda w, x: jnp.sum(w * x), gradient, make_optimizer(config, optax.constant_schedule(1e-3)))
        whole = all(np.isfinite(np.asarray(leaf, np.float64)).all() for leaf in jax.tree.leaves(after[:2]))
        assert whole or not all(np.isfinite(metrics[key]) for key in GOOD)
        overflown.append(not np.isfinite(metrics["grad_norm"]))
    assert overflown == [False, True, True]


def test_a_run_leaves_bad_steps_out_and_counts_them(make_experiment, capsys):
    """Steps whose targets' sum is a multiple of three have a loss that is not a number; the others train."""
    def loss(model, batch, **how):
        hidden, stats = model(batch.tokens, batch.segment_ids, batch.positions, **how)
        bad = jnp.sum(batch.targets) % 3 == 0
        return jnp.sum(hidden.astype(jnp.float32) ** 2) * jnp.where(bad, jnp.nan, 1e-6), stats

    training = {"steps": 8, "gradient_accumulation": 1, "on_bad_step": "skip"}
    trainer = loop.trained(make_experiment(training=training, data={"holdout": 0}), resume=False, own=Own(loss=loss))
    skipped = [record["step"] for record in trainer.history if record["skipped"]]
    assert 0 < len(skipped) < 8 and f"{len(skipped)} steps were skipped: their numbers were not finite" in capsys.readouterr().out
    kept = {path.name for path in (trainer.folder / "bad_steps").iterdir()}
    assert kept == {f"step-{step}.npz" for step in skipped}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trainer.program.state.trainable))
    assert [record["update_norm"] == 0 for record in trainer.history] == [record["skipped"] == 1 for record in trainer.history]


@jax.tree_util.register_pytree_node_class
class SimpleStats:
    def __init__(self, counts):
        self.counts = counts

    def tree_flatten(self):
        return (self.counts,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)
