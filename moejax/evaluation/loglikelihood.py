"""How likely a model finds given continuations: log-likelihoods of (context, continuation) pairs, in batches of like length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax import processes
from moejax.compiler_options import jit
from moejax.errors import UserError
from moejax.evaluation.generate import bucket, in_groups
from moejax.mesh import ROWS, Devices, of_model
from moejax.models.build import Model

CHUNK = 256  # places whose logits [CHUNK, V] exist at one time

Tokens = Sequence[int]


class Score(NamedTuple):
    """loglikelihood: sum of the continuation's log probabilities, in nats; greedy: whether each of its tokens is the likeliest."""

    loglikelihood: float
    greedy: bool


@partial(jit, static_argnums=(0, 6, 7))
def _score(
    graphdef: Any, state: nnx.State, tokens: jax.Array, lengths: jax.Array, starts: jax.Array, targets: jax.Array, chunk: int,
    devices: Devices | None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """tokens: int32 [B, T], right-padded; lengths, starts: int32 [B]; targets: int32 [B, C], -1 for none, predicted from place
    start, start + 1, …  Returns fp32 [B], bool [B]. devices: each has a part of the rows."""
    score = partial(_scored, graphdef, chunk)
    if devices is None:
        return score(state, tokens, lengths, starts, targets)
    places = (devices.of_weights(state), *(devices.of_rows(a) for a in (tokens, lengths, starts, targets)))
    found: tuple[jax.Array, jax.Array] = devices.over_rows(score, places, ROWS, state, tokens, lengths, starts, targets)
    return found


def _scored(
    graphdef: Any, chunk: int, state: nnx.State, tokens: jax.Array, lengths: jax.Array, starts: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    model: Model = nnx.merge(graphdef, state)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    real = (positions < lengths[:, None]).astype(jnp.int32)
    hidden = model(tokens, real, positions * real)[0]  # [B, T, D]
    places = jnp.minimum(starts[:, None] + jnp.arange(targets.shape[1]), tokens.shape[1] - 1)
    hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)  # [B, C, D]

    def part(piece: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows, wanted = piece
        logits = model.logits(rows)
        picked = jnp.take_along_axis(logits, jnp.maximum(wanted, 0)[:, None], axis=-1)[:, 0]
        likeliest = jnp.argmax(logits, axis=-1) == wanted
        return jnp.where(wanted >= 0, picked - jax.nn.logsumexp(logits, axis=-1), 0.0), likeliest | (wanted < 0)

    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    chunk = min(chunk, flat.shape[0])
    pad = -flat.shape[0] % chunk
    pieces = (jnp.pad(flat, ((0, pad), (0, 0))).reshape(-1, chunk, flat.shape[1]), jnp.pad(wanted, (0, pad)).reshape(-1, chunk))
    log_probabilities, likeliest = (a.reshape(-1)[: targets.size].reshape(targets.shape) for a in jax.lax.map(part, pieces))
    return jnp.sum(log_probabilities, axis=1), jnp.all(likeliest, axis=1)


def loglikelihoods(
    model: Model,
    pairs: Sequence[tuple[Tokens, Tokens]],
    *,
    rows: int,
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> list[Score]:
    """log p(continuation | context) for pairs of token ids, in their order. Adapters apply.

    rows: pairs computed together. progress(done, all) is called after each batch. Pairs of different lengths share a batch; one program
    is compiled for each length bucket. Raises UserError for an empty context or continuation, and where a pair exceeds the positions.
    """
    if rows < 1:
        raise UserError(f"rows = {rows}: expected 1 or more")
    limit = model.config.max_position_embeddings
    for index, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise UserError(f"pair {index}: its {'continuation' if context else 'context'} is empty: nothing can be scored")
        if len(context) + len(continuation) - 1 > limit:  # the last token is only predicted
            raise UserError(
                f"pair {index} has {len(context) + len(continuation)} tokens, the model {limit} positions: shorten its context"
            )
    graphdef, state = nnx.split(model)
    devices = of_model(state)
    if devices is not None:
        rows = devices.whole_rows(rows)
    scores: list[Score | None] = [None] * len(pairs)
    done = 0
    for chosen in in_groups([(bucket(len(a) + len(b) - 1), bucket(len(b))) for a, b in pairs], rows):
        contexts, continuations = zip(*(pairs[i] for i in chosen), strict=True)
        found = _score(graphdef, state, *_arrays(contexts, continuations, rows), CHUNK, devices)
        likelihoods, greedy = map(processes.everywhere, found)
        for place, index in enumerate(chosen):
            scores[index] = Score(float(likelihoods[place]), bool(greedy[place]))
        done += len(chosen)
        progress(done, len(pairs))
    return [score for score in scores if score is not None]


def _arrays(contexts: Sequence[Tokens], continuations: Sequence[Tokens], rows: int) -> tuple[np.ndarray, ...]:
    inputs = [[*a, *b][:-1] for a, b in zip(contexts, continuations, strict=True)]
    tokens = np.zeros((rows, bucket(max(map(len, inputs)))), np.int32)
    targets = np.full((rows, bucket(max(map(len, continuations)))), -1, np.int32)
    lengths, starts = np.ones(rows, np.int32), np.zeros(rows, np.int32)
    for row, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
        tokens[row, : len(inputs[row])] = inputs[row]
        targets[row, : len(continuation)] = continuation
        lengths[row], starts[row] = len(inputs[row]), len(context) - 1
    return tokens, lengths, starts, targets


def encoded(tokenizer: Any, text: str) -> list[int]:
    """Token ids, with no special token before or after; one whose name stands in the text is that token."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return ids
