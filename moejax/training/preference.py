"""Preference training (DPO, arXiv 2305.18290): the loss of pairs of answers, from the log-probabilities of model and reference.

The reference is the frozen base: the same weights with every adapter off, the router's too. Its log-probabilities are computed in the
step itself, on the same rows. So nothing is kept next to the run that a resumed one would have to find again, a packed pair meets the
reference in the very batch in which it meets the model, and no second model is in memory; a step takes one forward pass more.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.config import Experiment
from moejax.config_preference import PreferenceConfig
from moejax.data.batch import Batch, PairBatch
from moejax.models.build import Model, remove_lora
from moejax.models.moe import RouterStats
from moejax.models.ops.cross_entropy import token_log_probabilities

SHORTEST = 2
"""Tokens of the shortest side: what answers, and a token before it."""


class Side(NamedTuple):
    """Of one side of every pair of a micro-batch, fp32 [P]. logps: summed log-probabilities of the answer's tokens; ratios: those of model
    and reference, model less reference; tokens: how many there are."""

    logps: jax.Array
    ratios: jax.Array
    tokens: jax.Array


def told(experiment: Experiment) -> list[str]:
    """What a run trains on, in a line; none where it is not on preferences."""
    p, a = experiment.preference, experiment.adapter
    if p is None or a is None:
        return []
    smoothing = f", label smoothing {p.label_smoothing:g}" if p.label_smoothing else ""
    lines = [f"preference: {p.loss}, beta {p.beta:g}{smoothing}; the reference is the base with its adapter off, computed in the step"]
    if a.init_from is not None:
        lines.append(
            f"note: the reference is without the adapter of adapter.init_from = {a.init_from}, with which training begins. To prefer "
            "against that model, merge it (moejax export --format merged) and train a new adapter on it"
        )
    return lines


def pairs_in(batch: PairBatch) -> jax.Array:
    """Pairs of a batch [..., rows, T]: fp32 scalar."""
    return jnp.sum(jnp.max(batch.sides, axis=(-1, -2)) // 2).astype(jnp.float32)


def numbered_anew(batch: Batch | PairBatch) -> Batch | PairBatch:
    """Some rows of a batch [..., rows, T] with all sides of their pairs, whose sides are numbered as if there were no others."""
    if not isinstance(batch, PairBatch):
        return batch
    there = batch.sides > 0
    first = jnp.min(jnp.where(there, batch.sides, jnp.iinfo(jnp.int32).max), axis=(-1, -2), keepdims=True)
    return batch._replace(sides=jnp.where(there, batch.sides - first + 1, 0))


def losses(chosen: Side, rejected: Side, settings: PreferenceConfig) -> jax.Array:
    """The loss of each pair, fp32 [P], as TRL 1.16 has it. With label_smoothing, `sigmoid` is cDPO, whose pairs are swapped with that
    probability; TRL from 0.29 on takes no notice of the setting there."""
    beta, smoothing = settings.beta, settings.label_smoothing
    if settings.loss == "ipo":
        margin = chosen.ratios / jnp.maximum(chosen.tokens, 1) - rejected.ratios / jnp.maximum(rejected.tokens, 1)
        return jnp.square(margin - 1 / (2 * beta))
    margin = beta * (chosen.ratios - rejected.ratios)
    right, swapped = -jax.nn.log_sigmoid(margin), -jax.nn.log_sigmoid(-margin)
    if settings.loss == "robust":
        return ((1 - smoothing) * right - smoothing * swapped) / (1 - 2 * smoothing)
    return (1 - smoothing) * right + smoothing * swapped if smoothing else right


def sides_of(
    model: Model, batch: PairBatch, *, chunk_tokens: int, remat: str = "none", dropout_key: jax.Array | None = None
) -> tuple[tuple[Side, Side], RouterStats]:
    """((chosen, rejected), stats) of a micro-batch [rows, T]. model: with its adapter, which is taken off after the model's pass."""
    targets, mask = batch.targets.reshape(-1), batch.loss_mask.reshape(-1)

    def log_p(hidden: jax.Array) -> jax.Array:
        with jax.named_scope("loss"):
            rows = hidden.reshape(-1, hidden.shape[-1])
            own = model.output_rows
            trained = () if own is None else (own.ids, own.rows.get_value())
            return token_log_probabilities(chunk_tokens, rows, model.head_weight.get_value(), targets, mask, *trained)

    hidden, stats = model(batch.tokens, batch.segment_ids, batch.positions, remat=remat, dropout_key=dropout_key)
    ours = log_p(hidden)
    remove_lora(model)
    reference = jax.lax.stop_gradient(log_p(model(batch.tokens, batch.segment_ids, batch.positions)[0]))
    with jax.named_scope("loss"):
        places = 2 * (batch.tokens.size // (2 * SHORTEST))  # no more sides have room
        sums = jax.ops.segment_sum(
            jnp.stack([ours, ours - reference, mask], axis=-1), batch.sides.reshape(-1), num_segments=places + 1
        )  # [places + 1, 3]; place 0 is padding's
        pairs = sums[1:].reshape(-1, 2, 3)
    return (Side(*pairs[:, 0].T), Side(*pairs[:, 1].T)), stats


def pair_sums(settings: PreferenceConfig, chosen: Side, rejected: Side, batch: PairBatch) -> dict[str, jax.Array]:
    """Sums over the pairs of a micro-batch, by TRL's names: the loss, rewards (beta · ratio) and log-probabilities; and in how many pairs
    the chosen side is the likelier, which is no metric of TRL's."""
    there = jnp.arange(chosen.logps.shape[0]) < pairs_in(batch)

    def total(of_pairs: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(there, of_pairs, 0.0))

    with jax.named_scope("loss"):
        return {
            "loss": total(losses(chosen, rejected, settings)),
            "rewards/chosen": settings.beta * total(chosen.ratios),
            "rewards/rejected": settings.beta * total(rejected.ratios),
            "rewards/margins": settings.beta * total(chosen.ratios - rejected.ratios),
            "rewards/accuracies": total((chosen.ratios > rejected.ratios).astype(jnp.float32)),
            "logps/chosen": total(chosen.logps),
            "logps/rejected": total(rejected.logps),
            "logps/accuracies": total((chosen.logps > rejected.logps).astype(jnp.float32)),
        }
