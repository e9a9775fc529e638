"""One optimizer step and one evaluation step, as pure functions of pytrees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moejax.config_preference import PreferenceConfig
from moejax.data.batch import Batch, PairBatch
from moejax.mesh import WHOLE, Devices
from moejax.models.decoder import load_balancing_loss
from moejax.models.gradient_sums import GradientSums
from moejax.models.moe import RouterStats
from moejax.models.ops.cross_entropy import linear_cross_entropy
from moejax.models.ops.spread import AXIS
from moejax.training.low_precision import stored_like, widened
from moejax.training.preference import numbered_anew, pair_sums, pairs_in, sides_of

Tree = Any

_ROUNDING = 0x726F756E  # folded into the seed: no other draw of a run's begins with it


class TrainState(NamedTuple):
    """What changes: trainable weights, the optimizer's state, and the number of steps done (int32 on the device)."""

    trainable: Tree
    opt_state: optax.OptState
    step: jax.Array


Loss = Callable[..., tuple[jax.Array, RouterStats]]
"""loss(model, batch [rows, T], remat=…, dropout_key=…) -> (fp32 sum over the supervised tokens, the stats that `model(…)` returned)."""


@dataclass(frozen=True)
class Objective:
    """What is minimized, and how it is computed.

    loss = Σ cross-entropy over supervised tokens / their number in the whole optimizer step + aux_loss_coef · load balancing.
    stochastic: what is bf16 of the weights and the optimizer's state is computed in fp32 and rounded stochastically. loss: in the place
    of all this.
    layer_major: the micro-batches of a step pass each layer together.
    over_devices: a device has a part of a batch's rows, and all sums are of these; together they are those of the batch.
    preference: of a batch of pairs, Σ of their losses / their number takes the place of cross-entropy.
    skip_bad: a step whose loss or gradient is not finite changes no weight and no moment, and says so (metrics: skipped).
    """

    graphdef: Any
    full: bool  # every weight is trained (the head too), not only an adapter
    remat: str = "full"
    label_smoothing: float = 0.0
    aux_loss_coef: float = 0.0
    chunk_tokens: int = 1024
    dropout: float = 0.0
    stochastic: bool = False
    loss: Loss | None = None
    preference: PreferenceConfig | None = None
    layer_major: bool = False
    over_devices: bool = False
    skip_bad: bool = False


def weight_of(batch: Batch | PairBatch) -> jax.Array:
    """What the sums of a batch [..., rows, T] are divided by: supervised tokens, or pairs. fp32 scalar."""
    return pairs_in(batch) if isinstance(batch, PairBatch) else jnp.sum(batch.loss_mask)


def sums(
    objective: Objective, trainable: Tree, frozen: Tree, batch: Batch | PairBatch, dropout_key: jax.Array | None,
    gradient_sums: GradientSums | None = None,
) -> tuple[jax.Array, tuple[dict[str, jax.Array], RouterStats]]:  # fmt: skip
    """(what is differentiated, (sums by name, router stats)) of one micro-batch [rows, T], nothing divided yet: the loss, which is
    cross-entropy, and of pairs what `pair_sums` has. Of micro-batches that pass each layer together, [A, rows, T] with keys [A]: of all."""
    model = nnx.merge(objective.graphdef, trainable, frozen)
    model.gradient_sums = gradient_sums
    if objective.loss is not None:
        total, stats = objective.loss(model, batch, remat=objective.remat, dropout_key=dropout_key)
        return total, ({"loss": total}, stats)
    if isinstance(batch, PairBatch):
        assert objective.preference is not None
        sides, stats = sides_of(model, batch, chunk_tokens=objective.chunk_tokens, remat=objective.remat, dropout_key=dropout_key)
        found = pair_sums(objective.preference, *sides, batch)
        return _balanced(objective, found["loss"], stats, batch), (found, stats)
    hidden, stats = model(batch.tokens, batch.segment_ids, batch.positions, remat=objective.remat, dropout_key=dropout_key)
    with jax.named_scope("loss"):
        rows = model.output_rows
        cross_entropy = linear_cross_entropy(
            objective.chunk_tokens, objective.label_smoothing, objective.full, hidden.reshape(-1, hidden.shape[-1]),
            model.head_weight.get_value(), batch.targets.reshape(-1), batch.loss_mask.reshape(-1),
            *(() if rows is None else (rows.ids, rows.rows.get_value())),
        )  # fmt: skip
        total = _balanced(objective, cross_entropy, stats, batch)
    if batch.tokens.ndim == 3:
        stats = jax.tree.map(lambda a: jnp.sum(a, axis=1), stats)  # [L, A, E]
    return total, ({"loss": cross_entropy}, stats)


def _balanced(objective: Objective, total: jax.Array, stats: RouterStats, batch: Batch | PairBatch) -> jax.Array:
    """With the load-balancing loss of each micro-batch, where it is asked for."""

    def balance(stats: RouterStats, batch: Batch | PairBatch) -> jax.Array:
        # A product of two sums over all rows: of the probabilities it has this device's part, of the rest all.
        whole = stats._replace(counts=together(stats.counts))
        return load_balancing_loss(whole, together(jnp.sum(batch.segment_ids > 0))) * together(weight_of(batch))

    def together(part: jax.Array) -> jax.Array:
        return jax.lax.psum(part, AXIS) if objective.over_devices else part

    if objective.aux_loss_coef:
        of_all = balance(stats, batch) if batch.tokens.ndim == 2 else jnp.sum(jax.vmap(balance, (1, 0))(stats, batch))
        total = total + objective.aux_loss_coef * of_all
    return total


def make_train_step(
    objective: Objective, optimizer: optax.GradientTransformation, schedule: optax.Schedule | None, seed: int,
    devices: Devices | None = None,
) -> Callable[[TrainState, Tree, Batch], tuple[TrainState, dict[str, jax.Array]]]:  # fmt: skip
    """step(state, frozen, batch) -> (state, metrics). batch: leaves [A, rows, T], A micro-batches of one optimizer step.

    Gradients of the micro-batches are added and divided once by the supervised tokens (of preferences: the pairs) of all of them. Nothing
    but the batch has to be sent to the device: the keys of dropout and rounding are folded from the seed and the step. update_norm is of
    the change in the stored weights, after rounding. schedule: None where the optimizer is a caller's, whose learning rate is not known.

    devices: each has a part of every micro-batch's rows. Their gradients are added once, behind the last micro-batch; all else is computed
    of arrays of all devices.
    """
    if devices is not None:
        objective = replace(objective, over_devices=True)

    def gradients(trainable: Tree, frozen: Tree, micro: Batch, key: jax.Array | None) -> tuple[Any, Any]:
        def total(trainable: Tree) -> tuple[jax.Array, tuple[dict[str, jax.Array], RouterStats]]:
            return sums(objective, trainable, frozen, micro, key)

        return jax.grad(total, has_aux=True)(trainable)

    def with_gradients(grads: Tree, trainable: Tree, frozen: Tree, micro: Batch, key: jax.Array | None) -> tuple[Tree, Any]:
        """`grads` and those of a micro-batch, layer by layer in the same place."""

        def total(trainable: Tree, through: Tree) -> Any:
            gradient_sums = GradientSums(through)
            total, extra = sums(objective, trainable, frozen, micro, key, gradient_sums)
            return (total, gradient_sums.tree), extra

        (of_loss, _), pull, extra = jax.vjp(total, trainable, grads, has_aux=True)
        others, grads = pull((jnp.ones_like(of_loss), grads))  # of what stands in no stack; zeros for what does
        return jax.tree.map(jnp.add, grads, others), extra

    def summed(
        trainable: Tree, frozen: Tree, batch: Batch, key: jax.Array | None, rounding_key: jax.Array
    ) -> tuple[Tree, tuple[dict[str, jax.Array], RouterStats]]:
        """Gradients of all micro-batches, and what `sums` has besides."""
        if batch.tokens.shape[0] == 1:
            return gradients(trainable, frozen, jax.tree.map(lambda a: a[0], batch), key)
        if objective.layer_major:
            keys = None if key is None else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch.tokens.shape[0]))
            return gradients(trainable, frozen, batch, keys)

        def micro_step(carry: Any, xs: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            micro, index = xs
            micro_key = None if key is None else jax.random.fold_in(key, index)
            if objective.stochastic and any(a.dtype == jnp.bfloat16 for a in jax.tree.leaves(trainable)):
                part = gradients(trainable, frozen, micro, micro_key)
                total = jax.tree.map(jnp.add, widened(carry), widened(part))
                return stored_like(total, carry, jax.random.fold_in(rounding_key, 1 + index)), None
            grads, extra = with_gradients(carry[0], trainable, frozen, micro, micro_key)
            return (grads, jax.tree.map(jnp.add, carry[1], extra)), None

        # Traced without the backward pass, which takes a start most of its tracing: a gradient has its weight's shape.
        first = jax.tree.map(lambda a: a[0], batch)
        shapes = (trainable, jax.eval_shape(partial(sums, objective), trainable, frozen, first, key)[1])
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        index = jnp.arange(batch.tokens.shape[0])
        found: tuple[Any, Any] = jax.lax.scan(micro_step, zeros, (batch, index))[0]
        return found

    def step(state: TrainState, frozen: Tree, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step) if objective.dropout else None
        rounding_key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _ROUNDING), state.step)
        of_all = summed if devices is None else _over_devices(summed, devices)
        grads, (found, stats) = of_all(state.trainable, frozen, batch, key, rounding_key)
        with jax.named_scope("optimizer"):
            weight = weight_of(batch)
            if objective.stochastic:
                grads = _mean(widened(grads), weight)
                wide, moments = widened((state.trainable, state.opt_state))
                updates, moments = optimizer.update(grads, moments, wide)
                changed = (optax.apply_updates(wide, updates), moments)
                stored = (state.trainable, state.opt_state)
                trainable, opt_state = stored_like(changed, stored, jax.random.fold_in(rounding_key, 0))
            else:
                grads = _mean(grads, weight)
                updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
                trainable = optax.apply_updates(state.trainable, updates)
            metrics = {name: value / jnp.maximum(weight, 1) for name, value in found.items()} | {"grad_norm": _norm(grads)}
            if objective.skip_bad:
                good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
                changed, before = (trainable, opt_state), (state.trainable, state.opt_state)
                trainable, opt_state = jax.tree.map(lambda new, old: jnp.where(good, new, old), changed, before)
                metrics["skipped"] = 1.0 - good.astype(jnp.float32)
            metrics |= {
                "update_norm": _norm(jax.tree.map(_change, trainable, state.trainable)),
                "param_norm": _norm(trainable),
                "expert_counts": stats.counts,
            }
            if schedule is not None:
                metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
            if objective.aux_loss_coef:
                metrics["aux_loss"] = load_balancing_loss(stats, jnp.sum(batch.segment_ids > 0))
        return TrainState(trainable, opt_state, state.step + 1), metrics

    return step


def _over_devices(summed: Callable[..., Any], devices: Devices) -> Callable[..., Any]:
    """`summed` of each device's rows, and the sum over the devices. What one device alone trains (its experts' adapters) has met all rows
    there."""

    def of_all(trainable: Tree, frozen: Tree, batch: Any, *keys: Any) -> Any:
        places = devices.of_weights(trainable)
        own = [AXIS in place.spec for place in jax.tree.leaves(places)]

        def local(trainable: Tree, frozen: Tree, batch: Any, *keys: Any) -> Any:
            number = jax.lax.axis_index(AXIS)
            keys = tuple(None if key is None else jax.random.fold_in(key, number) for key in keys)
            grads, extra = summed(trainable, frozen, numbered_anew(batch), *keys)
            leaves, form = jax.tree.flatten(grads)
            # In fp32 whatever they are stored in: a sum over devices is no place to lose bits.
            shared, extra = jax.lax.psum(([g.astype(jnp.float32) for g, mine in zip(leaves, own, strict=True) if not mine], extra), AXIS)
            following = iter(shared)
            summed_up = [g if mine else next(following).astype(g.dtype) for g, mine in zip(leaves, own, strict=True)]
            return jax.tree.unflatten(form, summed_up), extra

        out = (jax.tree.map(lambda place: place.spec, places), WHOLE)
        where = (places, devices.of_weights(frozen), devices.of_rows(batch, 1), *(None for _ in keys))
        return devices.over_rows(local, where, out, trainable, frozen, batch, *keys)

    return of_all


def gradients_over(devices: Devices, objective: Objective) -> Callable[[Tree, Tree, Batch], tuple[jax.Array, Tree]]:
    """(loss, gradients) of a batch [rows, T] of which each device has a part, summed and not divided."""
    objective = replace(objective, over_devices=True)

    def summed(trainable: Tree, frozen: Tree, batch: Batch) -> tuple[Tree, jax.Array]:
        micro = jax.tree.map(lambda a: a[0], batch)
        total, grads = jax.value_and_grad(lambda weights: sums(objective, weights, frozen, micro, None)[0])(trainable)
        return grads, total

    def of_all(trainable: Tree, frozen: Tree, batch: Batch) -> tuple[jax.Array, Tree]:
        grads, total = _over_devices(summed, devices)(trainable, frozen, jax.tree.map(lambda a: a[None], batch))
        return total, grads

    return of_all


def _mean(grads: Tree, weight: jax.Array) -> Tree:
    """Sums of gradients over supervised tokens or pairs, by their number: divided in fp32, since bf16 cannot count beyond 256."""
    return jax.tree.map(lambda g: (g.astype(jnp.float32) / jnp.maximum(weight, 1)).astype(g.dtype), grads)


def _norm(tree: Tree) -> jax.Array:
    """Global norm, in fp32 whatever the leaves are."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)))


def _change(new: jax.Array, old: jax.Array) -> jax.Array:
    """fp32 new - old of stored weights."""
    wide = new.astype(jnp.float32)
    if new.dtype == jnp.bfloat16:
        # The compiler may leave out a rounding to bf16 that is followed by a widening; this one it has to do.
        wide = jax.lax.reduce_precision(wide, exponent_bits=8, mantissa_bits=7)
    return wide - old.astype(jnp.float32)


def make_eval_step(
    objective: Objective, devices: Devices | None = None
) -> Callable[[Tree, Tree, Batch | PairBatch], tuple[dict[str, jax.Array], jax.Array]]:
    """step(trainable, frozen, batch [rows, T]) -> (sums by name, what they are divided by): cross-entropy without smoothing and supervised
    tokens; of preferences what they are trained on, and pairs. devices: each has a part of the rows."""
    plain = replace(objective, label_smoothing=0.0, aux_loss_coef=0.0, remat="none", loss=None)

    def step(trainable: Tree, frozen: Tree, batch: Batch | PairBatch) -> tuple[dict[str, jax.Array], jax.Array]:
        _, (found, _) = sums(plain, trainable, frozen, batch, None)
        return found, weight_of(batch)

    def over_devices(trainable: Tree, frozen: Tree, batch: Batch | PairBatch) -> tuple[dict[str, jax.Array], jax.Array]:
        def local(trainable: Tree, frozen: Tree, batch: Batch | PairBatch) -> Any:
            return jax.lax.psum(step(trainable, frozen, numbered_anew(batch)), AXIS)

        assert devices is not None
        where = (devices.of_weights(trainable), devices.of_weights(frozen), devices.of_rows(batch))
        found: tuple[dict[str, jax.Array], jax.Array] = devices.over_rows(local, where, WHOLE, trainable, frozen, batch)
        return found

    return step if devices is None else over_devices
