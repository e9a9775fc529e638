"""Latent attention (arXiv 2405.04434) with rotary positions on a part of each head that keys share."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moejax.models.config import Architecture
from moejax.models.config.specs import MLA
from moejax.models.layers import Linear, RMSNorm, Target, fold, rotate
from moejax.models.ops.attention import masked_attention, segment_attention


class Latents(NamedTuple):
    """What keys and values of all layers are made from, [L, B, S, R + C]: a token's latent, and behind it the rotated part of its keys.
    Slot s holds position s."""

    held: jax.Array


class LatentAttention(nnx.Module):
    """Queries from x, or from a normed latent of it; keys and values of every head from another; causal softmax attention inside each
    segment, output projection; no biases.

    P, C: numbers of a head of q and k without and with positions; V: of v; R: of the latent; H heads.
    """

    splits_recomputation = True  # each half of the layer is recomputed by itself

    def __init__(self, key: jax.Array, spec: MLA, config: Architecture, dtype: Any, target: Target):
        keys = jax.random.split(key, 5)
        self.spec = spec
        sizes = {name: (matrix.inner, matrix.out) for name, matrix in spec.matrices(config.hidden_size).items()}

        def linear(key: jax.Array, name: str, axes: tuple[str, str]) -> Linear:
            return Linear(key, *sizes[name], dtype, scope="dequant", axes=axes)

        if spec.q_rank is None:
            self.q_proj = linear(keys[0], "q_proj", ("heads", "embed"))
        else:
            self.q_a_proj = linear(keys[0], "q_a_proj", ("latent", "embed"))
            self.q_a_norm = RMSNorm(spec.q_rank, spec.latent_eps, dtype, axis="latent")
            self.q_b_proj = linear(keys[4], "q_b_proj", ("heads", "latent"))
        self.kv_a_proj = linear(keys[1], "kv_a_proj", ("latent", "embed"))
        self.kv_a_norm = RMSNorm(spec.kv_rank, spec.latent_eps, dtype, axis="latent")
        self.kv_b_proj = linear(keys[2], "kv_b_proj", ("heads", "latent"))
        self.o_proj = linear(keys[3], "o_proj", ("embed", "heads"))

    @staticmethod
    def empty(spec: MLA, layers: int, batch: int, length: int, dtype: Any) -> Latents:
        """Of sequences that hold nothing: zeros [L, B, S, R + C]."""
        return Latents(jnp.zeros((layers, batch, length, spec.kv_rank + spec.rotary_dim), dtype))

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array, positions: jax.Array, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """x: [B, T, D]; segment_ids, positions: int32 [B, T]."""
        spec = self.spec
        with jax.named_scope("attention"):
            q, latent, turned = self._project(x, positions, dropout_key)
            expanded = self.kv_b_proj(latent, fold(dropout_key, 2)).reshape(*x.shape[:2], spec.heads, -1)
            k, v = expanded[..., : spec.plain_dim], expanded[..., spec.plain_dim :]
            k = jnp.concatenate([k, jnp.broadcast_to(turned[:, :, None], (*k.shape[:3], spec.rotary_dim))], axis=-1)
            out = checkpoint_name(segment_attention(_scaled(q, spec.score_scale), k, v, segment_ids), "mixed")
            return self.o_proj(out.reshape(*x.shape[:2], -1), fold(dropout_key, 3))

    def cached(
        self, x: jax.Array, valid: jax.Array, positions: jax.Array, cache: Latents, layer: jax.Array
    ) -> tuple[jax.Array, Latents]:
        """As `Attention.cached`. Keys and values are never expanded: a query is carried into the latents' space by the keys' part of
        kv_b_proj, and what the latents give it out of it by the values' part."""
        spec = self.spec
        with jax.named_scope("attention"):
            q, latent, turned = self._project(x, positions, None)
            rows = jnp.arange(x.shape[0])[:, None]
            cache = Latents(cache.held.at[layer, rows, positions].set(jnp.concatenate([latent, turned], axis=-1)))
            held = cache.held[layer]
            mask = jnp.arange(held.shape[1])[None, None, :] <= positions[:, :, None]
            weight = self.kv_b_proj.matrix(x.dtype).reshape(spec.heads, -1, spec.kv_rank)
            into = jnp.einsum("bthp,hpr->bthr", q[..., : spec.plain_dim], weight[:, : spec.plain_dim])
            queries = jnp.concatenate([into, q[..., spec.plain_dim :]], axis=-1)
            scale = spec.score_scale * spec.head_dim**-0.5
            seen = masked_attention(queries, held[:, None], held[:, None, :, : spec.kv_rank], mask, scale=scale)  # [B, T, H, R]
            out = jnp.einsum("bthr,hvr->bthv", seen, weight[:, spec.plain_dim :])
            return self.o_proj(out.reshape(*x.shape[:2], -1)), cache

    def _project(
        self, x: jax.Array, positions: jax.Array, dropout_key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, H, P + C], latents [B, T, R], and the rotated part of the keys [B, T, C]."""
        spec, first = self.spec, fold(dropout_key, 0)
        if spec.q_rank is None:
            q = self.q_proj(x, first)
        else:
            q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x, first)), fold(dropout_key, 4))
        q = q.reshape(*x.shape[:2], spec.heads, -1)
        q = jnp.concatenate([q[..., : spec.plain_dim], self._turned(q[..., spec.plain_dim :], positions)], axis=-1)
        latent = self.kv_a_proj(x, fold(dropout_key, 1))
        turned = self._turned(latent[:, :, None, spec.kv_rank :], positions)[:, :, 0]
        return q, self.kv_a_norm(latent[..., : spec.kv_rank]), turned

    def _turned(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """x: [B, T, H, C]. Pairs of neighbours come out as halves: q and k alike, so that scores are the same."""
        if self.spec.interleaved:
            x = jnp.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)
        return rotate(x, positions, self.spec.rope)


def _scaled(q: jax.Array, scale: float) -> jax.Array:
    return q if scale == 1.0 else (q.astype(jnp.float32) * scale).astype(q.dtype)
