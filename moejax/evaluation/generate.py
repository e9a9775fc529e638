"""Greedy decoding of a batch of prompts with the cache: one compiled program for prefill and all steps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.build import Model
from models.cache import Cache, decode_step, init_cache, prefill
from moejax.errors import UserError


@partial(jax.jit, static_argnums=(0, 4, 5))
def _greedy(graphdef: Any, state: nnx.State, tokens: jax.Array, lengths: jax.Array, steps: int, end: int) -> jax.Array:
    """int32 [B, steps]; after the end token, only that token."""
    model: Model = nnx.merge(graphdef, state)
    cache = init_cache(model, tokens.shape[0], tokens.shape[1] + steps)
    logits, cache = prefill(model, tokens, lengths, cache)
    first = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    out = jnp.full((tokens.shape[0], steps), end, jnp.int32).at[:, 0].set(first)

    def unfinished(carry: tuple[jax.Array, jax.Array, jax.Array, Cache]) -> jax.Array:
        step, token, _, _ = carry
        return (step < steps) & jnp.any(token != end)

    def body(carry: tuple[jax.Array, jax.Array, jax.Array, Cache]) -> tuple[jax.Array, jax.Array, jax.Array, Cache]:
        step, token, out, cache = carry
        logits, cache = decode_step(model, token, cache)
        following = jnp.where(token == end, end, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        return step + 1, following, out.at[:, step].set(following), cache

    return jax.lax.while_loop(unfinished, body, (jnp.int32(1), first, out, cache))[2]


def generate(
    model: Model, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, end: int, batch_size: int = 64
) -> list[list[int]]:
    """Greedy continuations of token-id prompts, each cut before its end token. Prompts of different lengths share a batch."""
    if any(not p for p in prompts):
        raise UserError(f"prompt {next(i for i, p in enumerate(prompts) if not p)} is empty: there is nothing to continue")
    graphdef, state = nnx.split(model)
    longest = -(-max(len(p) for p in prompts) // 16) * 16
    if longest + max_new_tokens > model.config.max_position_embeddings:
        raise UserError(
            f"prompts of {longest} tokens and {max_new_tokens} new ones exceed the model's {model.config.max_position_embeddings} positions"
        )
    answers: list[list[int]] = []
    for first in range(0, len(prompts), batch_size):
        chosen = list(prompts[first : first + batch_size])
        padded = chosen + [[0]] * (batch_size - len(chosen) if len(prompts) > batch_size else 0)
        tokens = np.zeros((len(padded), longest), np.int32)
        for row, prompt in enumerate(padded):
            tokens[row, : len(prompt)] = prompt
        lengths = np.array([len(p) for p in padded], np.int32)
        out = np.asarray(_greedy(graphdef, state, tokens, lengths, max_new_tokens, end))[: len(chosen)]
        answers += [row[: int(np.argmax(row == end))].tolist() if end in row else row.tolist() for row in out]
    return answers
