"""Causal attention inside segments by jax's own kernels for TPUs (`jax.experimental.pallas.ops.tpu.splash_attention`): scores never leave a
core's memory, a group's queries read its keys where they are, blocks outside a window are not read. Exact, as
`attention.segment_attention` is."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

LANES = 128
"""A row is filled up to a multiple of this many tokens."""
BLOCKS = (512, 384, 256, 128)
"""Queries and keys of a block: the largest that divides the row."""


def splash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, window: jax.Array | None = None, reach: int | None = None,
    sinks: jax.Array | None = None, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """q: [B, T, H, C]; k: [B, T, G, C]; v: [B, T, G, V] (H a multiple of G); segment_ids: int32 [B, T]; sinks: [H], one more logit of every
    query of a head, whose weight goes nowhere. Returns [B, T, H, V] in q's dtype.

    A kernel's window is part of its program. reach: how many positions a query sees, its own among them (None: all before it); window:
    int32, that number or one of at least T, in a program whose layers have either: then both kernels are in it and one of them runs.

    The output, and of whole lanes its softmax's sums, are named "mixed" for rematerialization policies. interpret: on a CPU, for tests.
    """
    t = q.shape[1]
    whole = t + -t % LANES

    def filled(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, whole - t), *[(0, 0)] * (x.ndim - 2))) if whole > t else x

    scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    operands: tuple[Any, ...] = *(jnp.swapaxes(filled(x), 1, 2) for x in (scaled, k, v)), filled(segment_ids), sinks  # [B, H, T, C]
    attend = _attend if q.shape[-1] % LANES == 0 else _by_groups
    everywhere, near = (partial(attend, within, interpret) for within in (None, reach))
    if reach is None or reach >= t:
        out = everywhere(*operands)
    elif window is None:
        out = near(*operands)
    else:
        out = jax.lax.cond(window < t, near, everywhere, *operands)
    return jnp.swapaxes(out, 1, 2)[:, :t]


def _by_groups(
    reach: int | None, interpret: bool, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, sinks: jax.Array | None
) -> jax.Array:
    """`_attend` of one group's heads after the other, [B, H, T, C]. Of narrow heads the kernel's operands take twice their numbers: they
    are there for a group at a time, forward and back; else queries lie as [..., T, heads of a group x C]."""
    (b, h, t, c), g = q.shape, k.shape[1]

    @jax.checkpoint
    def of_group(operands: Any) -> jax.Array:
        q, k, v, segment_ids, sinks = operands
        heads = jnp.swapaxes(q.reshape(t, h // g, c), 0, 1)
        out = _attend(reach, interpret, heads[None], k[None, None], v[None, None], segment_ids[None], sinks)[0]
        return jnp.swapaxes(out, 0, 1).reshape(t, -1)

    own_sinks = None if sinks is None else jnp.tile(sinks.reshape(g, -1), (b, 1))
    wide = jnp.swapaxes(q.reshape(b, g, h // g, t, c), 2, 3).reshape(b * g, t, -1)
    keys, values = (a.reshape(b * g, t, -1) for a in (k, v))
    with jax.named_scope("kv_groups"):
        out = jax.lax.map(of_group, (wide, keys, values, jnp.repeat(segment_ids, g, axis=0), own_sinks))
    out = checkpoint_name(out, "mixed").reshape(b, g, t, h // g, -1)
    return jnp.swapaxes(out, 2, 3).reshape(b, h, t, -1)


def _attend(
    reach: int | None, interpret: bool, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, sinks: jax.Array | None
) -> jax.Array:
    """Of scaled queries and whole blocks: [B, H, T, C] each."""
    import jax.experimental.pallas.ops.tpu.splash_attention as kernels  # at import it would cost every start

    h, t = q.shape[1:3]
    block = next(b for b in BLOCKS if t % b == 0)
    sizes = kernels.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    mask = kernels.CausalMask((t, t)) if reach is None else kernels.LocalMask((t, t), (reach - 1, 0), offset=0)
    attend: Any = kernels.make_splash_mha(
        kernels.MultiHeadMask([mask] * h), head_shards=1, q_seq_shards=1, block_sizes=sizes, residual_checkpoint_name="mixed",
        interpret=interpret,
    )  # fmt: skip

    def of_row(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
        out: jax.Array = attend(q, k, v, kernels.SegmentIds(segment_ids, segment_ids), sinks)
        return out

    return jax.vmap(of_row)(q, k, v, segment_ids)
