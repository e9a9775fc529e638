"""Decoding with a cache: prefill once, then a token at a time. What the cache holds is the model's affair."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax.models.config import specs


class Cache(NamedTuple):
    """layers: of each stack, attention's keys and values or Mamba's states, [L, B, …]; lengths: int32 [B], tokens held."""

    layers: Any
    lengths: jax.Array


def init_cache(model: Any, batch: int, length: int) -> Cache:
    """An empty cache for `batch` sequences of at most `length` tokens, prompt and answer together."""
    return Cache(model.init_cache(batch, length), jnp.zeros(batch, jnp.int32))


def prefill(model: Any, tokens: jax.Array, lengths: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Read right-padded tokens that follow what the cache holds. tokens: int32 [B, T]; lengths: int32 [B], of the tokens. Returns fp32
    logits [B, V] after each last token.

    Padding leaves nothing behind: its keys land in slots that later tokens overwrite before any of them can look there (or behind the
    last slot, where nothing is written), and states stop at the last real token.
    """
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden, layers = model.cached(tokens, places < lengths[:, None], cache.lengths[:, None] + places, cache.layers)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return model.logits(last), Cache(layers, cache.lengths + lengths.astype(jnp.int32))


def can_forget(model: Any) -> bool:
    """Whether a cache with smaller `lengths` is that of the first tokens alone: keys have a slot each, and a Mamba's state has none."""
    return not any(isinstance(stack.block.mixer, specs.Mamba) for stack in model.config.stacks)


def decode_step(model: Any, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Append one token to each sequence. tokens: int32 [B]. Returns fp32 logits [B, V] for the next."""
    valid = jnp.ones((tokens.shape[0], 1), bool)
    hidden, layers = model.cached(tokens[:, None], valid, cache.lengths[:, None], cache.layers)
    return model.logits(hidden[:, 0]), Cache(layers, cache.lengths + 1)
