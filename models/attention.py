"""Grouped-query attention with rotary positions."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moejax.models.config import Architecture
from moejax.models.config.specs import GQA
from moejax.models.layers import Linear, RMSNorm, Target, fold, rotate
from moejax.models.ops import flash
from moejax.models.ops.attention import masked_attention, segment_attention


class KeyValues(NamedTuple):
    """Keys and values of all layers, [L, B, G, S, C], slot s holding position s."""

    k: jax.Array
    v: jax.Array


class Attention(nnx.Module):
    """q, k, v projections, norms of q and k if the spec says so, rotary positions, causal softmax attention inside each segment, output
    projection; no biases."""

    splits_recomputation = True  # each half of the layer is recomputed by itself

    def __init__(self, key: jax.Array, spec: GQA, config: Architecture, dtype: Any, target: Target):
        keys = jax.random.split(key, 4)
        d, heads, kv = config.hidden_size, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        scope = "dequant"
        self.q_proj = Linear(keys[0], d, heads, dtype, scope=scope, axes=("heads", "embed"))
        self.k_proj = Linear(keys[1], d, kv, dtype, scope=scope, axes=("heads", "embed"))
        self.v_proj = Linear(keys[2], d, kv, dtype, scope=scope, axes=("heads", "embed"))
        self.o_proj = Linear(keys[3], heads, d, dtype, scope=scope, axes=("embed", "heads"))
        self.target = target
        self.head_dim, self.rope, self.qk_norm = spec.head_dim, spec.rope, spec.qk_norm
        if spec.qk_norm is not None:
            sizes = (spec.head_dim, spec.head_dim) if spec.qk_norm == "head" else (heads, kv)
            self.q_norm, self.k_norm = (RMSNorm(size, config.stream.norm_eps, dtype, axis="heads") for size in sizes)

    @staticmethod
    def empty(spec: GQA, layers: int, batch: int, length: int, dtype: Any) -> KeyValues:
        """Of sequences that hold nothing: zeros [L, B, G, S, C]."""
        shape = (layers, batch, spec.kv_heads, length, spec.head_dim)
        return KeyValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array, positions: jax.Array, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """x: [B, T, D]; segment_ids, positions: int32 [B, T]."""
        with jax.named_scope("attention"):
            q, k, v = self._project(x, positions, dropout_key)
            out = self._attend(q, k, v, segment_ids)
            return self.o_proj(out.reshape(*x.shape[:2], -1), fold(dropout_key, 3))

    def _attend(self, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
        if flash.why_blocks(self.target.attention, self.target.platform, q.dtype, self.head_dim, q.shape[1]) is None:
            return flash.flash_attention(q, k, v, segment_ids)
        return checkpoint_name(segment_attention(q, k, v, segment_ids), "mixed")

    def cached(
        self, x: jax.Array, valid: jax.Array, positions: jax.Array, cache: KeyValues, layer: jax.Array
    ) -> tuple[jax.Array, KeyValues]:
        """Write the keys and values of x at `positions` of `layer`, attend to everything at or before them. Returns output and cache.

        valid is not used: padding stands at positions that are overwritten before anything looks there.

        The whole cache comes in and goes out: a loop that carries it writes the new tokens in place, and copies no layer.
        """
        with jax.named_scope("attention"):
            q, k, v = self._project(x, positions, None)
            rows = jnp.arange(x.shape[0])[:, None]
            cache = KeyValues(*(old.at[layer, rows, :, positions].set(new) for old, new in zip(cache, (k, v), strict=True)))
            mask = jnp.arange(cache.k.shape[3])[None, None, :] <= positions[:, :, None]
            return self.o_proj(masked_attention(q, cache.k[layer], cache.v[layer], mask).reshape(*x.shape[:2], -1)), cache

    def _project(
        self, x: jax.Array, positions: jax.Array, dropout_key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, v = (projection(x, fold(dropout_key, i)) for i, projection in enumerate((self.q_proj, self.k_proj, self.v_proj)))
        if self.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (a.reshape(*x.shape[:2], -1, self.head_dim) for a in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, positions, self.rope), rotate(k, positions, self.rope), v
