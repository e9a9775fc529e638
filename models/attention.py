"""Grouped-query attention with rotary positions."""

from __future__ import annotations

from functools import partial
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
from moejax.models.ops.choice import is_tpu


class KeyValues(NamedTuple):
    """Keys and values of all layers, [L, B, G, S, C], slot s holding position s."""

    k: jax.Array
    v: jax.Array


class Attention(nnx.Module):
    """q, k, v projections, norms of q and k if the spec says so, rotary positions, causal softmax attention inside each segment, output
    projection; biases, a sink a head and a window as the spec has them."""

    splits_recomputation = True  # each half of the layer is recomputed by itself

    def __init__(self, key: jax.Array, spec: GQA, config: Architecture, dtype: Any, target: Target):
        keys = jax.random.split(key, 4)
        d, heads, kv = config.hidden_size, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        scope, bias = "dequant", spec.bias
        self.q_proj = Linear(keys[0], d, heads, dtype, scope=scope, axes=("heads", "embed"), bias=bias)
        self.k_proj = Linear(keys[1], d, kv, dtype, scope=scope, axes=("heads", "embed"), bias=bias)
        self.v_proj = Linear(keys[2], d, kv, dtype, scope=scope, axes=("heads", "embed"), bias=bias)
        self.o_proj = Linear(keys[3], heads, d, dtype, scope=scope, axes=("embed", "heads"), bias=bias)
        self.sinks: nnx.Variable | None = nnx.data(nnx.Param(jnp.zeros(spec.heads, dtype), axes=("heads",)) if spec.sinks else None)
        self.target, self.lacking = target, flash.unsupported(spec.sinks, spec.window)
        self.head_dim, self.rope, self.qk_norm, self.reach = spec.head_dim, spec.rope, spec.qk_norm, spec.window
        if spec.qk_norm is not None:
            sizes = (spec.head_dim, spec.head_dim) if spec.qk_norm == "head" else (heads, kv)
            self.q_norm, self.k_norm = (RMSNorm(size, config.stream.norm_eps, dtype, axis="heads") for size in sizes)

    @staticmethod
    def empty(spec: GQA, layers: int, batch: int, length: int, dtype: Any) -> KeyValues:
        """Of sequences that hold nothing: zeros [L, B, G, S, C]."""
        shape = (layers, batch, spec.kv_heads, length, spec.head_dim)
        return KeyValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array, positions: jax.Array, dropout_key: jax.Array | None = None,
        window: jax.Array | None = None,
    ) -> jax.Array:  # fmt: skip
        """x: [B, T, D]; segment_ids, positions: int32 [B, T]; window: int32, of this block (None: no block has one)."""
        with jax.named_scope("attention"):
            q, k, v = self._project(x, positions, dropout_key)
            out = self._attend(q, k, v, segment_ids, window)
            return self.o_proj(out.reshape(*x.shape[:2], -1), fold(dropout_key, 3))

    def _attend(self, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, window: jax.Array | None) -> jax.Array:
        asked, platform = self.target.attention, self.target.platform
        if flash.why_blocks(asked, platform, q.dtype, self.head_dim, q.shape[1], self.lacking) is None:
            reach = None if window is None else self.reach
            return flash.attention(platform, q, k, v, segment_ids, window=window, reach=reach, sinks=self._sinks)
        return checkpoint_name(segment_attention(q, k, v, segment_ids, window=window, sinks=self._sinks), "mixed")

    @property
    def _sinks(self) -> jax.Array | None:
        return None if self.sinks is None else self.sinks.get_value()

    def cached(
        self, x: jax.Array, valid: jax.Array, positions: jax.Array, cache: KeyValues, layer: jax.Array, window: jax.Array | None = None
    ) -> tuple[jax.Array, KeyValues]:
        """Write the keys and values of x at `positions` of `layer`, attend to what the window has of everything at or before them. Returns
        output and cache.

        valid is not used: padding stands at positions that are overwritten before anything looks there.

        The whole cache comes in and goes out: a loop that carries it writes the new tokens in place, and copies no layer.
        """
        with jax.named_scope("attention"):
            q, k, v = self._project(x, positions, None)
            rows = jnp.arange(x.shape[0])[:, None]
            cache = KeyValues(*(old.at[layer, rows, :, positions].set(new) for old, new in zip(cache, (k, v), strict=True)))
            back = positions[:, :, None] - jnp.arange(cache.k.shape[3])[None, None, :]
            mask = back >= 0 if window is None else (back >= 0) & (back < window)
            out = masked_attention(q, cache.k[layer], cache.v[layer], mask, self._sinks)
            return self.o_proj(out.reshape(*x.shape[:2], -1)), cache

    def _project(
        self, x: jax.Array, positions: jax.Array, dropout_key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, v = (projection(x, fold(dropout_key, i)) for i, projection in enumerate((self.q_proj, self.k_proj, self.v_proj)))
        if self.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (a.reshape(*x.shape[:2], -1, self.head_dim) for a in (q, k, v))
        turned = partial(rotate, positions=positions, rope=self.rope, whole=is_tpu(self.target.platform))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return turned(q), turned(k), v
