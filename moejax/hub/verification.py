"""Whether what was written computes what was trained: matrix by matrix, and token by token with the experts that the trained model chose.

In a mixture of experts a rounding in the last bits sends a token whose router is nearly undecided to another expert, and its logits, and
those of the tokens that attend to it, are then far off: neither is right or wrong. So the written model's tokens go through the trained
model's experts, and where it would have chosen others, the router itself is judged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.hub.layerwise import Checkpoint, Routing, Walk
from moejax.models.ops.quantized import dequantized

ROUNDING = 1e-5
"""Of a matrix's largest number: fp32 sums in another order. What is stored in fewer bits may be off by half of its last one as well."""


_NOT_COMPUTED = (
    "new_rows", "expert_format", "bos_token_id", "eos_token_id", "router_aux_loss_coef", "max_position_embeddings", "predicting_layers",
)  # fmt: skip


class Different(Exception):
    """The written model is another one: what it was seen by."""


class Comparison(NamedTuple):
    """Of two models' logits on one row of tokens."""

    largest: float  # logit difference
    share: float  # … of the largest logit
    equal: int  # positions whose likeliest next token is the same
    tokens: int
    rerouted: int  # tokens that the written model by itself would send to another expert in some layer
    gap: float  # the largest difference of two probabilities that would change places


def compare(
    checkpoints: Sequence[Checkpoint], tokens: np.ndarray, limit: float, advance: Callable[[], None] = lambda: None, *,
    rounding: float = 0.0,
) -> Comparison:  # fmt: skip
    """Of two models: one checkpoint's two adapters, or two checkpoints. The first is the trained one.

    tokens: int32 [T]. limit: what logits are allowed to differ by, as a share of the largest (not judged here). Two experts whose scores
    (log-odds) are closer than twice that share of the layer's largest score may change places. advance: called after each layer. rounding:
    what a written matrix may be off beyond its dtype's, as a share of its largest number. In memory is one layer of each checkpoint.
    Raises `Different` for another architecture, a matrix that differs by more than rounding, and a token that goes elsewhere without a
    tie; UserError as `Walk` does.
    """
    with ExitStack() as stack:
        walks = [Walk(checkpoint, tokens, stack) for checkpoint in checkpoints]
        (first, one), (second, other) = [(walk, model) for walk in walks for model in range(len(walk.streams))]
        _same_architecture(first, second)
        _same_matrices(first, one, second, other, rounding)
        rerouted, gap = np.zeros(len(tokens), bool), 0.0
        for layer in range(first.layers):
            for walk in walks:
                walk.read(layer)
            _same_matrices(first, one, second, other, rounding)
            trained = first.step(one)
            written = second.step(other, None if trained is None else trained.own)
            if trained is not None and written is not None:
                changed, apart = _changed_places(trained, written, limit, layer)
                rerouted |= changed
                gap = max(gap, apart)
            advance()
        for walk in walks:
            walk.end()
        _same_matrices(first, one, second, other, rounding)
        expected, actual = first.logits(one), second.logits(other)
    largest = float(np.abs(expected - actual).max())
    equal = int((expected.argmax(-1) == actual.argmax(-1)).sum())
    return Comparison(largest, largest / float(np.abs(expected).max()), equal, len(tokens), int(rerouted.sum()), gap)


def _same_architecture(first: Walk, second: Walk) -> None:
    for name, value in vars(first.sizes).items():
        written = getattr(second.sizes, name, None)
        if written != value and name not in _NOT_COMPUTED:
            raise Different(f"its config.json says {name} = {written}, and {value} was trained")


def _changed_places(trained: Routing, written: Routing, limit: float, layer: int) -> tuple[np.ndarray, float]:
    """bool [T]: which tokens would go to another expert; how far apart the two probabilities are at most."""
    count = trained.own.shape[1]
    changed = (np.sort(trained.own) != np.sort(written.own)).any(-1)
    bounded = np.clip(trained.probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
    scores = np.log(bounded) - np.log1p(-bounded)
    tie = 2 * limit * np.abs(scores).max()
    p = -np.sort(-trained.ranked.astype(np.float64))  # [T, E], the largest first
    if np.array_equal(trained.ranked, trained.probabilities):
        scores = -np.sort(-scores)
        apart = scores[:, count - 1] - scores[:, count]
    else:  # with a bias for the choice; a sigmoid is at most a fourth as steep as its log-odds
        apart, tie = p[:, count - 1] - p[:, count], tie / 4
    no_tie = np.flatnonzero(changed & ~(apart <= tie))
    if no_tie.size:
        t = int(no_tie[0])
        raise Different(
            f"in layer {layer} token {t} goes to experts {sorted(written.own[t].tolist())} instead of {sorted(trained.own[t].tolist())}, "
            f"and their probabilities ({p[t, count - 1]:.3g} and {p[t, count]:.3g}) are no tie"
        )
    return changed, float((p[:, count - 1] - p[:, count])[changed].max(initial=0.0))


def _same_matrices(first: Walk, one: int, second: Walk, other: int, rounding: float) -> None:
    """Of those in memory."""
    for a, b in zip(first.matrices(), second.matrices(), strict=True):
        excess = float(_excess(a.value, a.pairs[one], b.value, b.pairs[other]))
        if not excess <= ROUNDING + rounding:  # NaN too
            raise Different(f"{a.name} differs from what was trained by {100 * excess:.2g} % of its largest number, rounding left out")


@jax.jit
def _excess(a: Any, pair_a: Any, b: Any, pair_b: Any) -> jax.Array:
    """By how much two matrices differ beyond the rounding of the second one's storage, as a share of the first one's largest number."""
    expected, actual = _whole(a, pair_a), _whole(b, pair_b)
    half_a_bit = jnp.finfo(b.dtype).eps / 2 if isinstance(b, jax.Array) and pair_b is None else 0.0
    beyond = jnp.abs(expected - actual) - half_a_bit * jnp.abs(expected)
    return jnp.max(beyond) / jnp.maximum(jnp.max(jnp.abs(expected)), 1e-30)


def _whole(value: Any, pair: Any) -> jax.Array:
    """fp32: a matrix with its adapter."""
    matrix = dequantized(value, jnp.float32)
    if pair is None:
        return matrix
    a, b, scale = pair
    return matrix + scale * jnp.matmul(b, a, precision="highest")
