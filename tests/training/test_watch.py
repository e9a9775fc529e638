"""Steps whose numbers are wrong: reported with their batch, skipped or the end of the run."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.data.batch import Batch
from moejax.errors import UserError
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


def test_skipped_steps_are_counted_and_ten_in_a_row_end_the_run(tmp_path, capsys):
    looking, bad = watch(tmp_path, "skip"), GOOD | {"loss": float("nan"), "skipped": 1.0}
    for step in range(1, BAD_IN_A_ROW):
        looking.look(step, bad, BATCH, None)
    looking.look(BAD_IN_A_ROW, GOOD | {"skipped": 0.0}, BATCH, None)
    assert looking.conclude() == ["9 steps were skipped: their numbers were not finite"]
    with pytest.raises(UserError, match="the last of 10 one after the other"):
        for step in range(20, 20 + BAD_IN_A_ROW):
            looking.look(step, bad, BATCH, None)
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


@pytest.mark.parametrize("factor", [1.0, float("nan")])
def test_a_bad_step_changes_no_weight_and_no_moment(monkeypatch, factor):
    """The step with `skip_bad`, of a model that is one weight."""
    optimizer = optax.adam(0.1)

    def sums(objective, trainable, frozen, batch, key, gradient_sums=None):
        loss = jnp.sum(trainable["w"] ** 2) * frozen
        return loss, ({"loss": loss}, SimpleStats(jnp.zeros((1, 2))))

    monkeypatch.setattr("moejax.training.step.sums", sums)
    step = jax.jit(make_train_step(Objective(None, full=True, skip_bad=True), optimizer, None, 0))
    weights = {"w": jnp.ones(3)}
    before = TrainState(weights, optimizer.init(weights), jnp.int32(0))
    after, metrics = step(before, jnp.float32(factor), Batch(*(jnp.ones((1, 1, 4)) for _ in range(5))))
    same = [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(after[:2]), jax.tree.leaves(before[:2]), strict=True)]
    assert (not any(same), metrics["skipped"]) == (True, 0.0) if factor == 1.0 else (all(same), metrics["skipped"]) == (True, 1.0)
    assert after.step == 1


@jax.tree_util.register_pytree_node_class
class SimpleStats:
    def __init__(self, counts):
        self.counts = counts

    def tree_flatten(self):
        return (self.counts,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)
