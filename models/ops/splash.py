"""Causal attention inside segments by jax's own kernels for TPUs (`jax.experimental.pallas.ops.tpu.splash_attention`): scores never leave a
core's memory, a group's queries read its keys where they are. Exact, as `attention.segment_attention` is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

LANES = 128
"""A row is filled up to a multiple of this many tokens."""
BLOCKS = (512, 384, 256, 128)
"""Queries and keys of a block: the largest that divides the row."""


def splash_attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, interpret: bool = False) -> jax.Array:
    """q: [B, T, H, C]; k: [B, T, G, C]; v: [B, T, G, V] (H a multiple of G); segment_ids: int32 [B, T]. Returns [B, T, H, V] in q's dtype.

    The output and its softmax's sums are named "mixed" for rematerialization policies. interpret: on a CPU, for tests.
    """
    import jax.experimental.pallas.ops.tpu.splash_attention as kernels  # at import it would cost every start

    t, h = q.shape[1:3]
    whole = t + -t % LANES
    block = next(b for b in BLOCKS if whole % b == 0)
    sizes = kernels.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    mask = kernels.MultiHeadMask([kernels.CausalMask((whole, whole))] * h)
    attend: Any = kernels.make_splash_mha(
        mask, head_shards=1, q_seq_shards=1, block_sizes=sizes, residual_checkpoint_name="mixed", interpret=interpret
    )

    def filled(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, whole - t), *[(0, 0)] * (x.ndim - 2))) if whole > t else x

    def of_row(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
        out: jax.Array = attend(q, k, v, kernels.SegmentIds(segment_ids, segment_ids))
        return out

    scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    q, k, v = (jnp.swapaxes(filled(x), 1, 2) for x in (scaled, k, v))  # [B, H, T, C]
    return jnp.swapaxes(jax.vmap(of_row)(q, k, v, filled(segment_ids)), 1, 2)[:, :t]
