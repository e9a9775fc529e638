"""Causal attention inside segments, for grouped queries: exact for packed rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp

QUERY_BLOCK = 512


def masked_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention. q: [B, T, H, C]; k, v: [B, S, G, C] (H a multiple of G); mask: bool [B, T, S]. Returns [B, T, H, C].

    Scores and softmax in fp32. Every query must see at least one key.
    """
    b, t, h, c = q.shape
    g = k.shape[2]
    grouped = q.reshape(b, t, g, h // g, c)
    scores = jnp.einsum("btgqc,bsgc->bgqts", grouped, k, preferred_element_type=jnp.float32) * c**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bgqts,bsgc->btgqc", weights, v).reshape(b, t, h, c)


def segment_attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Causal attention that never crosses a segment's boundary. q: [B, T, H, C]; k, v: [B, T, G, C]; segment_ids: int32 [B, T].

    Rows longer than QUERY_BLOCK are computed block by block, each block recomputed in the backward pass, so that the scores
    [B, H, T, T] never exist as a whole.
    """
    t = q.shape[1]
    index = jnp.arange(t, dtype=jnp.int32)

    def block(q: jax.Array, query_segments: jax.Array, query_index: jax.Array) -> jax.Array:
        mask = (query_segments[:, :, None] == segment_ids[:, None, :]) & (query_index[:, None] >= index[None, :])[None]
        return masked_attention(q, k, v, mask)

    if t <= QUERY_BLOCK or t % QUERY_BLOCK:
        return block(q, segment_ids, index)
    n = t // QUERY_BLOCK
    blocks = (
        q.reshape(q.shape[0], n, QUERY_BLOCK, *q.shape[2:]).swapaxes(0, 1),
        segment_ids.reshape(-1, n, QUERY_BLOCK).swapaxes(0, 1),
        index.reshape(n, QUERY_BLOCK),
    )
    out = jax.lax.map(jax.checkpoint(lambda xs: block(*xs), prevent_cse=False), blocks)
    return out.swapaxes(0, 1).reshape(q.shape)
