"""Causal attention inside segments, for grouped queries: exact for packed rows, and never the whole score matrix in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

SMALLEST_BLOCK, LARGEST_BLOCK = 128, 512


def masked_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, sinks: jax.Array | None = None, scale: float | None = None
) -> jax.Array:
    """Softmax attention. q: [B, T, H, C]; k: [B, G, S, C]; v: [B, G, S, V] (H a multiple of G); mask: bool [B, T, S]; sinks: [H], one more
    logit of every query of a head, whose weight goes nowhere. Returns [B, T, H, V].

    Scores and softmax in fp32. Every query must see at least one key. scale: of the scores; None: C^-1/2.
    """
    b, t, h, c = q.shape
    g = k.shape[1]
    grouped = q.reshape(b, t, g, h // g, c)
    scores = jnp.einsum("btgqc,bgsc->bgqts", grouped, k, preferred_element_type=jnp.float32) * (c**-0.5 if scale is None else scale)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    if sinks is not None:
        more = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(1, g, h // g, 1, 1), (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, more], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : v.shape[2]].astype(v.dtype)
    # One batched product of matrices: XLA's CPU compiler is four times slower at the same with its result in another order.
    out = jnp.matmul(weights.reshape(b, g, -1, v.shape[2]), v)
    return out.reshape(b, g, h // g, t, -1).transpose(0, 3, 1, 2, 4).reshape(b, t, h, -1)


def segment_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, window: jax.Array | None = None, sinks: jax.Array | None = None
) -> jax.Array:
    """Causal attention that never crosses a segment's boundary. q: [B, T, H, C]; k: [B, T, G, C]; v: [B, T, G, V]; segment_ids: int32
    [B, T]; window: int32, how many positions a query sees, its own among them (None: all before it); sinks: [H], one more logit of every
    query of a head, whose weight goes nowhere: the output times sigmoid(log of the softmax's sum - sink). Returns [B, T, H, V].

    Query blocks one after the other, each against the keys up to its end (what lies behind is masked anyway). The backward pass
    keeps q, k, v and one fp32 number per query (the log of its softmax's sum, named for rematerialization policies), and computes
    the weights again, as FlashAttention does (arXiv 2205.14135). It needs no output: a policy that keeps the stream behind the
    attention recomputes q, k and v only. Scores, softmax and sums in fp32.
    """
    b, t, h, c = q.shape
    g = k.shape[2]
    # The queries of a group stand next to each other: one product serves them all. [B, G, H/G, T, C] and [B, G, T, C].
    grouped = q.reshape(b, t, g, h // g, c).transpose(0, 2, 3, 1, 4)
    of_group = None if sinks is None else sinks.astype(jnp.float32).reshape(g, h // g)
    out = _attend(grouped, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), of_group, segment_ids, window)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, h, -1)


def _blocks(t: int) -> Iterator[slice]:
    """A quarter of the row at a time: less than two thirds of the full square is computed, in few and large products."""
    size = min(LARGEST_BLOCK, max(SMALLEST_BLOCK, -(-t // 4)))
    for start in range(0, t, size):
        yield slice(start, min(start + size, t))


def _rows(x: jax.Array, block: slice) -> jax.Array:
    """The block's queries of a group as one matrix: [B, G, Q, T, …] -> [B, G, Q·n, …]."""
    part = x[:, :, :, block]
    return part.reshape(*part.shape[:2], -1, *part.shape[4:])


def _unrows(parts: list[jax.Array], queries: int) -> jax.Array:
    """Blocks [B, G, Q·n, …] back to [B, G, Q, T, …]."""
    return jnp.concatenate([p.reshape(*p.shape[:2], queries, -1, *p.shape[3:]) for p in parts], axis=3)


def _transposed(x: jax.Array) -> jax.Array:
    """[…, m, n] -> […, n, m], as an array: behind the barrier the products stay row times column. XLA's CPU backend is several
    times slower when a product has to contract the last axis of both, or the first."""
    return jax.lax.optimization_barrier(jnp.swapaxes(x, -1, -2))


def _times(a: jax.Array, b: jax.Array) -> jax.Array:
    """fp32 [B, G, m, n] = a [B, G, m, k] b [B, G, k, n]."""
    return jnp.einsum("bgmk,bgkn->bgmn", a, b, preferred_element_type=jnp.float32)


def _scores(q: jax.Array, kt: jax.Array, segment_ids: jax.Array, window: jax.Array | None, block: slice) -> jax.Array:
    """Scaled scores fp32 [B, G, Q·n, e] of the block's queries against keys 0..e (kt: [B, G, C, T]); the least number where a key
    is not visible."""
    index = jnp.arange(block.stop)
    same = segment_ids[:, block, None] == segment_ids[:, None, : block.stop]
    visible = same & (index[block, None] >= index[None, :])[None]
    if window is not None:
        visible &= (index[block, None] - index[None, :] < window)[None]
    visible = jnp.tile(visible, (1, q.shape[2], 1))[:, None]
    scores = _times(_rows(q, block), kt[..., : block.stop])
    return jnp.where(visible, scores * q.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)


def _of_rows(sinks: jax.Array, rows: jax.Array) -> jax.Array:
    """[G, Q] -> [G, Q·n, 1], for the rows of a block [B, G, Q·n, …]."""
    return jnp.repeat(sinks, rows.shape[2] // sinks.shape[1], axis=1)[..., None]


def _forward_blocks(
    q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None, segment_ids: jax.Array, window: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    outs, sums, kt = [], [], _transposed(k)
    for block in _blocks(q.shape[3]):
        scores = _scores(q, kt, segment_ids, window, block)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        if sinks is not None:
            largest = jnp.maximum(largest, _of_rows(sinks, scores))
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        if sinks is not None:
            total = total + jnp.exp(_of_rows(sinks, scores) - largest)
        out = _times(weights.astype(v.dtype), v[:, :, : block.stop])
        outs.append((out / total).astype(v.dtype))
        sums.append((largest + jnp.log(total))[..., 0])
    return _unrows(outs, q.shape[2]), _unrows(sums, q.shape[2])


@jax.custom_vjp
def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None, segment_ids: jax.Array, window: jax.Array | None
) -> jax.Array:
    return _forward_blocks(q, k, v, sinks, segment_ids, window)[0]


def _attend_forward(*operands: Any) -> tuple[jax.Array, Any]:
    out, log_sums = _forward_blocks(*operands)
    return out, (operands, checkpoint_name(log_sums, "attention_log_sums"))


def _attend_backward(residuals: Any, dout: jax.Array) -> tuple[Any, ...]:
    (q, k, v, sinks, segment_ids, window), log_sums = residuals
    scale = q.shape[-1] ** -0.5
    kt, vt = _transposed(k), _transposed(v)
    dqs, dkt, dvt = [], jnp.zeros(kt.shape, jnp.float32), jnp.zeros(vt.shape, jnp.float32)
    dsinks = None if sinks is None else jnp.zeros(sinks.shape, jnp.float32)
    for block in _blocks(q.shape[3]):
        keys = slice(0, block.stop)
        # An invisible key's score is the least number: its weight comes out as exactly zero.
        log_sum = _rows(log_sums, block)[..., None]
        weights = jnp.exp(_scores(q, kt, segment_ids, window, block) - log_sum)
        dout_rows = _rows(dout, block)
        dweights = _times(dout_rows, vt[..., keys])
        # FlashAttention sums output times its gradient; over the keys it is the same sum, and needs no output.
        delta = jnp.sum(weights * dweights, axis=-1, keepdims=True)
        dscores = (weights * (dweights - delta) * scale).astype(q.dtype)
        if dsinks is not None:  # a sink's own weight has no gradient: what is left of the softmax's is minus its weight times delta
            dsinks -= (jnp.exp(_of_rows(sinks, log_sum) - log_sum) * delta).sum((0, 3)).reshape(*sinks.shape, -1).sum(-1)
        dqs.append(_times(dscores, k[:, :, keys]).astype(q.dtype))
        dkt = dkt.at[..., keys].add(_times(_transposed(_rows(q, block)), dscores))
        dvt = dvt.at[..., keys].add(_times(_transposed(dout_rows), weights.astype(v.dtype)))
    dk, dv = jnp.swapaxes(dkt, 2, 3).astype(k.dtype), jnp.swapaxes(dvt, 2, 3).astype(v.dtype)
    return _unrows(dqs, q.shape[2]), dk, dv, dsinks, None, None


_attend.defvjp(_attend_forward, _attend_backward)
