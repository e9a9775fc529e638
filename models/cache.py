"""Decoding with a key-value cache: prefill once, then a token at a time."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from models.attention import KeyValues
from models.mixtral import Mixtral


class Cache(NamedTuple):
    """kv: keys and values, [L, B, S, G, C], in the model's dtype; lengths: int32 [B], tokens held per sequence."""

    kv: KeyValues
    lengths: jax.Array


def init_cache(model: Mixtral, batch: int, length: int) -> Cache:
    """An empty cache for `batch` sequences of at most `length` tokens, prompt and answer together."""
    c = model.config
    shape = (c.num_layers, batch, length, c.num_kv_heads, c.head_dim)
    return Cache(KeyValues(jnp.zeros(shape, model.dtype), jnp.zeros(shape, model.dtype)), jnp.zeros(batch, jnp.int32))


def prefill(model: Mixtral, tokens: jax.Array, lengths: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Read right-padded prompts. tokens: int32 [B, T]; lengths: int32 [B]. Returns fp32 logits [B, V] after each last token.

    The padding's keys land in slots that later tokens overwrite before any of them can look there.
    """
    t = tokens.shape[1]
    positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), tokens.shape)
    hidden, kv = model.cached(tokens, positions < lengths[:, None], positions, cache.kv)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return model.logits(last), Cache(kv, lengths.astype(jnp.int32))


def decode_step(model: Mixtral, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Append one token to each sequence. tokens: int32 [B]. Returns fp32 logits [B, V] for the next."""
    valid = jnp.ones((tokens.shape[0], 1), bool)
    hidden, kv = model.cached(tokens[:, None], valid, cache.lengths[:, None], cache.kv)
    return model.logits(hidden[:, 0]), Cache(kv, cache.lengths + 1)
