"""One optimizer step: micro-batches are one batch, clipping comes after their sum, dropout is drawn again and seeded."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support import TINY, assert_close_to_largest

from moejax.data.batch import Batch
from moejax.data.batching import assemble, stack
from moejax.data.tokenize import Query
from moejax.models.build import build
from moejax.models.config import PRESETS, LoRAConfig
from moejax.models.config.adapters import Pair
from moejax.models.lora import LoRA
from moejax.training.program import initial_state, split
from moejax.training.step import Objective, make_eval_step, make_train_step, sums

SIZES = PRESETS["mixtral-tiny"].replace(**TINY, vocab_size=64, experts_per_token=4)  # dense: the smallest program
ADAPTER = LoRAConfig(2, 4.0, 0.5, ("q_proj", "w2"))
RATE = optax.constant_schedule(1.0)


def queries(*lengths):
    """Token by token at random; but for the first two all are supervised."""
    rng = np.random.default_rng(0)
    return [Query.after(2, rng.integers(1, 64, n).astype(np.int32)) for n in lengths]


@pytest.fixture(scope="module")
def parts():
    """(graphdef, adapters whose B is drawn at random, frozen weights)."""
    graphdef, trainable, frozen = split(build(SIZES, key=jax.random.key(0), adapter=ADAPTER, dtype=jnp.float32), full=False)
    leaves, structure = jax.tree.flatten(trainable)
    rng = np.random.default_rng(1)
    return graphdef, jax.tree.unflatten(structure, [jnp.asarray(0.3 * rng.normal(size=a.shape), a.dtype) for a in leaves]), frozen


def stepper(parts, optimizer, seed=0, **settings):
    """step(batch, number) -> (weights after it, metrics), from the same weights each time."""
    graphdef, trainable, frozen = parts
    step = jax.jit(make_train_step(Objective(graphdef, full=False, **settings), optimizer, RATE, seed))
    state = initial_state(trainable, optimizer)

    def run(batch, number=0):
        after, metrics = step(state._replace(step=jnp.int32(number)), frozen, batch)
        return after.trainable, metrics

    return run


@pytest.mark.parametrize("clip_norm", [None, 1e-2])
def test_micro_batches_are_one_batch(clip_norm, parts):
    """Of 14 + 1 and 2 supervised tokens: a token weighs the same in any micro-batch, and only the whole gradient is clipped."""
    optimizer = optax.sgd(RATE) if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), optax.sgd(RATE))
    first, second, third = queries(16, 3, 4)
    run = stepper(parts, optimizer)
    apart, metrics = run(stack([assemble([[first], [second]], 2, 16), assemble([[third]], 2, 16)], 2))
    whole, expected = run(stack([assemble([[first], [second], [third]], 4, 16)], 1))
    for name in ("loss", "grad_norm", "update_norm"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, err_msg=name)
    np.testing.assert_array_equal(metrics["expert_counts"], expected["expert_counts"])
    assert metrics["grad_norm"] > 2e-2
    if clip_norm is not None:
        np.testing.assert_allclose(metrics["update_norm"], clip_norm, rtol=1e-5)
    for before, ours, theirs in zip(*map(jax.tree.leaves, (parts[1], apart, whole)), strict=True):
        assert_close_to_largest(ours - before, np.asarray(theirs - before), 1e-4, "update")


def _once(model, batch, **passed):
    hidden, stats = model(batch.tokens, batch.segment_ids, batch.positions, **passed)
    return jnp.sum(jnp.square(hidden) * batch.loss_mask[..., None]), stats


def _twice(model, batch, **passed):
    (first, _), (second, stats) = (_once(model, batch, **passed) for _ in range(2))
    return first * second**0.5, stats


def _inside(model, batch, **passed):
    return jax.checkpoint(lambda batch: _once(model, batch, **passed))(batch)


def _of_a_copy(model, batch, **passed):
    return _once(nnx.merge(*nnx.split(model)), batch, **passed)


@pytest.mark.parametrize("loss", [pytest.param(_once, marks=pytest.mark.long), _twice, _inside, _of_a_copy])
def test_gradients_add_up_whatever_a_loss_does_with_the_model(loss, parts):
    """A pass in which layers add their gradients to the sums of the step, two of them, none."""
    run = stepper(parts, optax.sgd(RATE), loss=loss)
    first, second = (assemble([[query]], 1, 16) for query in queries(16, 9))
    whole = stepper(parts, optax.sgd(RATE), loss=lambda model, batch, **passed: _sum_of(loss, model, batch, **passed))
    apart, metrics = run(stack([first, second], 2))
    together, expected = whole(stack([assemble([[query] for query in queries(16, 9)], 2, 16)], 1))
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    for before, ours, theirs in zip(*map(jax.tree.leaves, (parts[1], apart, together)), strict=True):
        assert_close_to_largest(ours - before, np.asarray(theirs - before), 1e-4, "update")


def _sum_of(loss, model, batch, **passed):
    """Of every row by itself."""
    found = [loss(model, jax.tree.map(lambda a, i=i: a[i : i + 1], batch), **passed) for i in range(2)]
    return found[0][0] + found[1][0], jax.tree.map(jnp.add, found[0][1], found[1][1])


def test_an_empty_micro_batch_changes_nothing(parts):
    """An epoch's last step is filled up with some."""
    micro = assemble([[query] for query in queries(16, 9)], 2, 16)
    run = stepper(parts, optax.sgd(RATE))
    filled, metrics = run(stack([micro], 2))
    alone, expected = run(stack([micro], 1))
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-6)
    for ours, theirs in zip(*map(jax.tree.leaves, (filled, alone)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_dropout_is_seeded_and_drawn_anew(parts):
    """The same step draws the same; another step, another seed and another micro-batch draw otherwise."""
    micro = assemble([[query] for query in queries(16, 12)], 2, 16)
    one = stack([micro], 1)
    run = stepper(parts, optax.sgd(RATE), dropout=ADAPTER.dropout)
    loss = [float(run(one, number)[1]["loss"]) for number in (0, 0, 1)]
    assert loss[0] == loss[1] and abs(loss[0] - loss[2]) > 1e-3
    assert abs(float(stepper(parts, optax.sgd(RATE), seed=1, dropout=ADAPTER.dropout)(one)[1]["loss"]) - loss[0]) > 1e-3
    # The same queries twice, of which only the first or only the second counts.
    mute = micro._replace(loss_mask=np.zeros_like(micro.loss_mask))
    first, second = (float(run(stack(pair, 2))[1]["loss"]) for pair in ([micro, mute], [mute, micro]))
    assert abs(first - second) > 1e-3


def test_dropout_keeps_the_mean():
    lora = LoRA(jax.random.key(0), (), 4, 4, Pair(2, 4.0), 0.25, ("a", "b"))
    dropped = np.asarray(lora.dropped(jnp.ones((100, 400)), jax.random.key(1)))
    assert set(np.unique(dropped)) == {0.0, np.float32(4 / 3)} and abs(dropped.mean() - 1) < 0.02


def test_each_layer_draws_its_own_dropout():
    """Two layers of the same weights that pass the stream on as it is: what q_proj's adapter sees differs only by the mask."""
    seen = []
    config = LoRAConfig(2, 4.0, 0.5, ("q_proj",))
    graphdef, state = nnx.split(build(SIZES, key=jax.random.key(0), adapter=config, dtype=jnp.float32))
    tokens = jnp.ones((1, 8), jnp.int32)
    plain = jax.random.bernoulli

    def watched(key, p, shape):
        mask = plain(key, p, shape)
        jax.debug.callback(lambda m: seen.append(np.asarray(m)), mask)
        return mask

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.random, "bernoulli", watched)
        run = jax.jit(lambda state, key: nnx.merge(graphdef, state)(tokens, tokens, jnp.arange(8)[None], dropout_key=key)[0])
        jax.block_until_ready(run(state, jax.random.key(3)))
        jax.effects_barrier()
    assert len(seen) == SIZES.num_layers == 2 and 0.2 < np.mean(seen) < 0.8
    assert not np.array_equal(*seen)


def test_evaluation_is_plain(parts):
    """Without dropout, smoothing, balance loss: Σ -log p of the supervised tokens, and their number."""
    graphdef, trainable, frozen = parts
    batch = assemble([[query] for query in queries(16, 9)], 2, 16)
    objective = Objective(graphdef, full=False, dropout=0.5, label_smoothing=0.3, aux_loss_coef=0.5)
    total, tokens = jax.jit(make_eval_step(objective))(trainable, frozen, Batch(*map(jnp.asarray, batch)))
    assert int(tokens) == batch.loss_mask.sum() == 14 + 7
    expected = jax.jit(lambda t: sums(Objective(graphdef, full=False), t, frozen, batch, None)[0])(trainable)
    np.testing.assert_allclose(total["loss"], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("preset", "k", "targets", "remat"),
    [
        ("mixtral-tiny", 2, ("q_proj", "w1", "w2", "w3", "gate"), "full"),
        pytest.param("mixtral-tiny", 8, ("q_proj", "w1", "w2"), "dots", marks=pytest.mark.long),
        ("blackmamba-tiny", 2, None, "full"),
        pytest.param("mixtral-tiny", 2, ("q_proj", "w2"), "none", marks=pytest.mark.long),
        pytest.param("qwen3-moe-tiny", 4, ("q_proj", "w2"), "dots", marks=pytest.mark.long),
    ],
)  # fmt: skip
def test_layers_take_all_micro_batches_together(preset, k, targets, remat):
    """The same loss, metrics and gradients as one micro-batch after the other: its own dropout, its own balance, its own padding."""
    adapter = None if targets is None else LoRAConfig(2, 4.0, 0.5, targets)
    sizes = PRESETS[preset].replace(num_layers=2, vocab_size=64, experts_per_token=k)
    graphdef, trainable, frozen = split(build(sizes, key=jax.random.key(0), adapter=adapter, dtype=jnp.float32), full=adapter is None)
    rng = np.random.default_rng(1)
    if adapter is not None:
        trainable = jax.tree.map(lambda a: jnp.asarray(0.3 * rng.normal(size=a.shape), a.dtype), trainable)
    micro = [assemble([[query] for query in queries(*lengths)], 2, 16) for lengths in ((16, 9), (3, 12), (5,))]
    settings = {"remat": remat, "aux_loss_coef": 0.5, "dropout": 0.5 if adapter else 0.0}
    ours, expected = (
        stepper((graphdef, trainable, frozen), optax.sgd(RATE), layer_major=together, **settings)(stack(micro, 3))
        for together in (True, False)
    )
    np.testing.assert_array_equal(ours[1].pop("expert_counts"), expected[1].pop("expert_counts"))
    for name in expected[1]:
        np.testing.assert_allclose(ours[1][name], expected[1][name], rtol=2e-5, err_msg=name)
    for before, one, other in zip(*map(jax.tree.leaves, (trainable, ours[0], expected[0])), strict=True):
        assert_close_to_largest(one - before, np.asarray(other - before), 2e-4, "update")
