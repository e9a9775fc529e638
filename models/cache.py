"""Decoding with a cache: prefill once, then a token at a time. What the cache holds is the model's affair."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Cache(NamedTuple):
    """layers: of each stack, attention's keys and values or Mamba's states, [L, B, …]; lengths: int32 [B], tokens held."""

    layers: Any
    lengths: jax.Array


def init_cache(model: Any, batch: int, length: int) -> Cache:
    """An empty cache for `batch` sequences of at most `length` tokens, prompt and answer together."""
    return Cache(model.init_cache(batch, length), jnp.zeros(batch, jnp.int32))


def prefill(model: Any, tokens: jax.Array, lengths: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Read right-padded prompts. tokens: int32 [B, T]; lengths: int32 [B]. Returns fp32 logits [B, V] after each last token.

    Padding leaves nothing behind: its keys land in slots that later tokens overwrite before any of them can look there, and states
    stop at the last real token.
    """
    t = tokens.shape[1]
    positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), tokens.shape)
    hidden, layers = model.cached(tokens, positions < lengths[:, None], positions, cache.layers)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return model.logits(last), Cache(layers, lengths.astype(jnp.int32))


def decode_step(model: Any, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Append one token to each sequence. tokens: int32 [B]. Returns fp32 logits [B, V] for the next."""
    valid = jnp.ones((tokens.shape[0], 1), bool)
    hidden, layers = model.cached(tokens[:, None], valid, cache.lengths[:, None], cache.layers)
    return model.logits(hidden[:, 0]), Cache(layers, cache.lengths + 1)
