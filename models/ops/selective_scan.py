"""The selective scan of Mamba (arXiv 2312.00752), exact for packed rows, in forms that differ in speed and memory only.

    h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t        (h_{t-1} := 0 at a segment's first token)
    y_t = <h_t, C_t> + D u_t

per channel d and state n, in fp32. One array of all states, [B, T, D, N], is what must never exist: 1.5 GB a layer at 2.8 B, batch 16,
length 512. All forms run over chunks and have their own gradient: the forward pass keeps the state at each chunk's start, the backward
pass computes a chunk's states again and runs through them in reverse. Two differ in the recurrence inside a chunk: `chunked` goes step
by step (a CPU's cache likes it), `chunked_associative` takes log(chunk) wide steps (a GPU would otherwise be launched for each);
`choice.json` says which runs where. `kernel` is the third, for GPUs: `scan_kernel.py`.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moejax.models.ops import scan_kernel
from moejax.models.ops.choice import CHUNKS


def selective_scan(
    u: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    d: jax.Array,
    starts: jax.Array | None = None,
    state: jax.Array | None = None,
    *,
    form: str = "chunked",
    chunk: int | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """y: fp32 [B, T, D], and the last state: fp32 [B, D, N].

    u, dt: [B, T, D] (dt after softplus); a: [D, N], negative; b, c: [B, T, N]; d: [D]; any float dtype, computed in fp32. starts: bool
    [B, T], true at a segment's first token (None: nowhere); state: [B, D, N] before the first token (None: zero). Gradients: all
    but starts. form: one of `CHUNKS`; chunk: tokens of a chunk (the kernel has its own); interpret: the kernel on a CPU, for tests.
    """
    dt, a, d = (x.astype(jnp.float32) for x in (dt, a, d))
    starts, state = _given(u, a, starts, state)
    if form == "kernel":
        return scan_kernel.scan(u, dt, a, b, c, d, starts, state, interpret=interpret)
    u, b, c = (x.astype(jnp.float32) for x in (u, b, c))
    # Inside, channels come last: [B, N, D]. All products and sums over states then run along contiguous memory.
    operands = (dt * u, dt, a.T, b, c, starts, jnp.swapaxes(state, 1, 2))
    y, last = _chunked(form == "chunked_associative", min(chunk or CHUNKS[form], u.shape[1]), *operands)
    return y + d * u, jnp.swapaxes(last, 1, 2)


def gated(
    u: jax.Array,
    raw: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    d: jax.Array,
    bias: jax.Array,
    z: jax.Array,
    starts: jax.Array | None = None,
    state: jax.Array | None = None,
    *,
    form: str,
    chunk: int | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`selective_scan` between softplus and the gate, as a layer has it: y silu(z) in u's dtype [B, T, D], and the last state.

    raw: dt before bias [D] and softplus (minus infinity: the token does nothing); z: the last D channels of [B, T, D or more].
    """
    a, d, bias = (x.astype(jnp.float32) for x in (a, d, bias))
    if form == "kernel":
        with jax.named_scope("scan"):
            y, last = scan_kernel.scan(u, raw, a, b, c, d, *_given(u, a, starts, state), (bias, z), interpret)
        return checkpoint_name(y, "mixed"), last
    dt = jax.nn.softplus(raw.astype(jnp.float32) + bias)
    with jax.named_scope("scan"):
        y, last = selective_scan(u, dt, a, b, c, d, starts, state, form=form, chunk=chunk)
    y = checkpoint_name(y, "mixed")
    return (y * jax.nn.silu(z[..., z.shape[2] - u.shape[2] :].astype(jnp.float32))).astype(u.dtype), last


def _given(u: jax.Array, a: jax.Array, starts: jax.Array | None, state: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Where segments start (None: nowhere), and the first state (None: zero)."""
    starts = jnp.zeros(u.shape[:2], bool) if starts is None else starts
    return starts, jnp.zeros((u.shape[0], *a.shape), jnp.float32) if state is None else state.astype(jnp.float32)


class _Chunk(NamedTuple):
    """A chunk's operands, time first. x = dt·u, dt: [c, B, D]; b, c: [c, B, N]; starts: bool [c, B]."""

    x: jax.Array
    dt: jax.Array
    b: jax.Array
    c: jax.Array
    starts: jax.Array


def _decay(dt: jax.Array, a: jax.Array, starts: jax.Array) -> jax.Array:
    """exp(dt A), zero at starts: [..., N, D] for dt [..., D], a [N, D] and starts [...]."""
    return jnp.where(starts[..., None, None], 0.0, jnp.exp(dt[..., None, :] * a))


def _outer(x: jax.Array, b: jax.Array) -> jax.Array:
    """[..., N, D] of x [..., D] and b [..., N]."""
    return x[..., None, :] * b[..., :, None]


def _merge(first, second):  # type: ignore[no-untyped-def]
    """h ↦ g2 (g1 h + s1) + s2."""
    return first[0] * second[0], second[0] * first[1] + second[1]


def _slice(arrays, index, chunk):  # type: ignore[no-untyped-def]
    """Chunk `index` of arrays [B, T, …], time first. Sliced where they lie: no copy of the whole in another order."""
    return _Chunk(*(jnp.swapaxes(jax.lax.dynamic_slice_in_dim(v, index * chunk, chunk, 1), 0, 1) for v in arrays))


def _write(array, part, index, chunk):  # type: ignore[no-untyped-def]
    return jax.lax.dynamic_update_slice_in_dim(array, jnp.swapaxes(part, 0, 1), index * chunk, 1)


def _recur(associative: bool, g: jax.Array, s: jax.Array, h: jax.Array, reverse: bool = False) -> jax.Array:
    """All h_t = g_t h_{t-1} + s_t of a chunk (from its end if `reverse`): [c, B, N, D]. The only part that has to know an order;
    what surrounds it runs over the whole chunk at once."""
    if associative:
        first = -1 if reverse else 0
        return jax.lax.associative_scan(_merge, (g, s.at[first].add(g[first] * h)), axis=0, reverse=reverse)[1]

    def body(h, xs):  # type: ignore[no-untyped-def]
        h = xs[0] * h + xs[1]
        return h, h

    return jax.lax.scan(body, h, (g, s), reverse=reverse)[1]


def _chunk_forward(associative: bool, t: _Chunk, a: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """y [c, B, D] and the state after the chunk."""
    h = _recur(associative, _decay(t.dt, a, t.starts), _outer(t.x, t.b), state)
    return jnp.sum(h * t.c[..., :, None], axis=-2), h[-1]


def _chunk_backward(associative: bool, t: _Chunk, a: jax.Array, state: jax.Array, dy: jax.Array, dstate: jax.Array):  # type: ignore[no-untyped-def]
    """Gradients of a chunk: (dx, ddt [c, B, D], db, dc [c, B, N]), da [N, D], and of the state before the chunk.

    dy: [c, B, D]; dstate: of the state after the chunk. With e_t = ∂/∂h_t: e_t = C_t dy_t + g_{t+1} e_{t+1}; dx = <e, B>, dB = Σ_d e x,
    dC = Σ_d h dy, and through the decay e_t h_{t-1} g_t: ddt = <…, A>, dA = Σ_{b,t} … dt.
    """
    g = _decay(t.dt, a, t.starts)
    h = _recur(associative, g, _outer(t.x, t.b), state)
    before = jnp.concatenate([state[None], h[:-1]])
    later = jnp.concatenate([g[1:], jnp.ones_like(g[:1])])
    e = _recur(associative, later, _outer(dy, t.c), dstate, reverse=True)
    through = e * before * g
    grads = (
        jnp.sum(e * t.b[..., :, None], axis=-2),
        jnp.sum(through * a, axis=-2),
        jnp.sum(e * t.x[..., None, :], axis=-1),
        jnp.sum(h * dy[..., None, :], axis=-1),
    )
    return grads, jnp.sum(through * t.dt[..., None, :], axis=(0, 1)), g[0] * e[0]


def _padded(arrays, chunk):  # type: ignore[no-untyped-def]
    """Time filled up to whole chunks: dt = 0 and x = 0 leave the state as it is."""
    pad = -arrays[0].shape[1] % chunk
    return [jnp.pad(v, [(0, 0), (0, pad)] + [(0, 0)] * (v.ndim - 2)) for v in arrays] if pad else list(arrays)


def _forward(associative, chunk, x, dt, a, b, c, starts, state):  # type: ignore[no-untyped-def]
    """y, the last state, and the state before each chunk, [T/c, B, N, D]."""
    length = x.shape[1]
    arrays = _padded((x, dt, b, c, starts), chunk)

    def body(carry, index):  # type: ignore[no-untyped-def]
        h, y = carry
        part, last = _chunk_forward(associative, _slice(arrays, index, chunk), a, h)
        return (last, _write(y, part, index, chunk)), h

    count = arrays[0].shape[1] // chunk
    (last, y), boundaries = jax.lax.scan(body, (state, jnp.zeros_like(arrays[0])), jnp.arange(count))
    return y[:, :length], last, boundaries


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(associative, chunk, *operands):  # type: ignore[no-untyped-def]
    return _forward(associative, chunk, *operands)[:2]


def _chunked_forward(associative, chunk, *operands):  # type: ignore[no-untyped-def]
    y, last, boundaries = _forward(associative, chunk, *operands)
    return (y, last), (operands[:-1], checkpoint_name(boundaries, "scan_states"))


def _chunked_backward(associative, chunk, residuals, cotangents):  # type: ignore[no-untyped-def]
    (x, dt, a, b, c, starts), boundaries = residuals
    length = x.shape[1]
    dy, dstate = cotangents
    *arrays, dy = _padded((x, dt, b, c, starts, dy), chunk)

    def body(carry, xs):  # type: ignore[no-untyped-def]
        dstate, da, outs = carry
        index, state = xs
        dy_part = jnp.swapaxes(jax.lax.dynamic_slice_in_dim(dy, index * chunk, chunk, 1), 0, 1)
        grads, da_part, dstate = _chunk_backward(associative, _slice(arrays, index, chunk), a, state, dy_part, dstate)
        outs = [_write(out, part, index, chunk) for out, part in zip(outs, grads, strict=True)]
        return (dstate, da + da_part, outs), None

    outs = [jnp.zeros_like(v) for v in arrays[:4]]
    xs = (jnp.arange(boundaries.shape[0]), boundaries)
    (dstate, da, outs), _ = jax.lax.scan(body, (dstate, jnp.zeros_like(a), outs), xs, reverse=True)
    dx, ddt, db, dc = (v[:, :length] for v in outs)
    return dx, ddt, da, db, dc, None, dstate


_chunked.defvjp(_chunked_forward, _chunked_backward)
