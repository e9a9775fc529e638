"""The selective scan as two Pallas kernels for GPUs (Triton's lowering): states stay in registers, arrays are read and written once.

A program is one row and `BLOCK` channels, and goes through time. Forward it writes y and, for the gradient, the state before every `KEPT`
tokens: 4 N / KEPT bytes a token and channel, 97 MB a layer of 16 x 512 x 2944. Backward it runs through those stretches in reverse, and
through the chunks of `CHUNK` tokens in them: a chunk's states are computed again from the stretch's first. Sums over time (A, D) stay in
registers, sums over channels (B, C) are written by program and added up by XLA: no atomics, the same bits every time.

x = dt·u and D·u are computed inside, and with `gate` softplus and silu(z) too, a channel a lane: dt and y are then in memory in fp32 in
neither pass.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax.models.ops.choice import CHUNKS

KEPT = CHUNKS["kernel"]
CHUNK = 4
"""Tokens whose states the backward pass has in registers: 8 spill."""
BLOCK = 32
CAPABILITY = 8.0
"""CUDA's compute capability from which on jax lowers Pallas kernels."""
FORGET = 3e38
"""For dt at a segment's first token: exp(FORGET A) is 0 for every negative A, and what was before is gone."""


def refusal(platform: str, capability: float | None) -> str | None:
    """Why the kernel cannot run there; None where it can. capability: CUDA's number of the card; None: unknown, taken for enough."""
    if platform == "cpu" or platform.startswith("TPU"):
        return f"the scan's kernel is for GPUs, and this is a {'CPU' if platform == 'cpu' else platform}"
    if capability is not None and capability < CAPABILITY:
        return f"the scan's kernel needs compute capability {CAPABILITY}, and {platform} has {capability}"
    return None


def scan(
    u: jax.Array, dt: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array, starts: jax.Array, state: jax.Array,
    gate: tuple[jax.Array, jax.Array] | None = None, interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """`selective_scan.selective_scan` with all operands there. u, b, c (with gate dt and z) in any float dtype; the others: fp32. Filled up
    to whole blocks: dt = 0 leaves a state as it is, b = c = 0 hides one."""
    length, (channels, states) = u.shape[1], a.shape
    t, n, w = -length % KEPT, (1 << (states - 1).bit_length()) - states, -channels % BLOCK

    def whole(x: jax.Array, *more: int, by: float = 0.0) -> jax.Array:
        return jnp.pad(x, [(0, count) for count in more], constant_values=by) if any(more) else x

    row, read = (0, t, w), (0, t, n)
    before: tuple[jax.Array, ...] = ()
    if gate is not None:
        bias, z = gate
        z = z if w == 0 and z.shape[2] % BLOCK == 0 else z[..., -channels:]
        before = whole(bias, w), whole(z, *row)
    y, last = _scan(
        interpret, whole(u, *row), whole(dt, *row, by=0.0 if gate is None else -jnp.inf), whole(a.T, n, w), whole(b, *read),
        whole(c, *read), whole(d, w), whole(starts.astype(jnp.int32), 0, t), before, whole(jnp.swapaxes(state, 1, 2), 0, n, w),
    )  # fmt: skip
    return y[:, :length, :channels], jnp.swapaxes(last[:, :states, :channels], 1, 2)


def _exp2(x: jax.Array, interpret: bool) -> jax.Array:
    """One instruction, where exp is seven and what Triton makes of exp2 four: they keep results below 2^-126."""
    from jax.experimental.pallas import triton

    if interpret:
        return jnp.exp2(x)
    found: jax.Array = triton.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;", args=[x], constraints="=f,f", pack=1, result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)]
    )[0]
    return found


class _Token(NamedTuple):
    """What a program reads of a token, at its place in time. a: A log2 e; bias, z: of the gate, or None."""

    u: Any
    dt: Any
    a: jax.Array
    b: Any
    c: Any
    d: jax.Array
    starts: Any
    bias: jax.Array | None
    z: Any
    interpret: bool

    @classmethod
    def of(cls, interpret: bool, u: Any, dt: Any, a: Any, b: Any, c: Any, d: Any, starts: Any, *gate: Any) -> _Token:
        bias, z = (gate[0][...], gate[1]) if gate else (None, None)
        return cls(u, dt, a[...] * math.log2(math.e), b, c, d[...], starts, bias, z, interpret)

    def row(self, ref: Any, t: Any) -> jax.Array:
        found: jax.Array = ref[t].astype(jnp.float32)
        return found

    def column(self, ref: Any, t: Any) -> jax.Array:
        return self.row(ref, t)[:, None]

    def step(self, t: Any) -> jax.Array:
        """dt: [D]."""
        dt = self.row(self.dt, t)
        if self.bias is None:
            return dt
        x = dt + self.bias
        return jnp.maximum(x, 0.0) + jnp.log1p(_exp2(-math.log2(math.e) * jnp.abs(x), self.interpret))

    def sigmoid(self, x: jax.Array) -> jax.Array:
        return 1.0 / (1.0 + _exp2(-math.log2(math.e) * x, self.interpret))

    def decay(self, t: Any, dt: jax.Array) -> jax.Array:
        """exp(dt A), zero at starts: [N, D]."""
        return _exp2(jnp.where(self.starts[t] != 0, FORGET, dt)[None] * self.a, self.interpret)

    def states(self, first: Any, h: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
        """Of `CHUNK` tokens from `first` on: the state before and after each, and the steps."""
        found: list[jax.Array] = [h]
        steps: list[jax.Array] = []
        for t in (first + i for i in range(CHUNK)):
            steps.append(dt := self.step(t))
            found.append(self.decay(t, dt) * found[-1] + (dt * self.row(self.u, t))[None] * self.column(self.b, t))
        return found, steps

    def scanned(self, t: Any, h: jax.Array) -> jax.Array:
        """y before the gate, of the state after the token."""
        return jnp.sum(h * self.column(self.c, t), axis=0) + self.d * self.row(self.u, t)


def _scan_forward_kernel(given, interpret, *refs):  # type: ignore[no-untyped-def]
    token, (state, y, last, *kept) = _Token.of(interpret, *refs[:given]), refs[given:]

    def chunk(first: Any, h: jax.Array) -> jax.Array:
        after = token.states(first, h)[0][1:]
        for t, h in ((first + i, h) for i, h in enumerate(after)):
            found = token.scanned(t, h)
            if token.bias is not None:
                z = token.row(token.z, t)
                found = found * (z * token.sigmoid(z))
            y[t] = found.astype(y.dtype)
        return after[-1]

    def stretch(index: Any, h: jax.Array) -> jax.Array:
        if kept:
            kept[0][index] = h
        return jax.lax.fori_loop(0, KEPT // CHUNK, lambda i, h: chunk(index * KEPT + i * CHUNK, h), h)

    last[...] = jax.lax.fori_loop(0, token.u.shape[0] // KEPT, stretch, state[...])


def _scan_backward_kernel(given, interpret, *refs):  # type: ignore[no-untyped-def]
    """With e_t = ∂/∂h_t: e_t = C_t dy_t + g_{t+1} e_{t+1}; `later` is that last term."""
    token, (kept, dy, dlast, du, ddt, da, db, dc, dd, dstate, *gate) = _Token.of(interpret, *refs[:given]), refs[given:]
    a, d = token.a, token.d

    def chunk(first: Any, h: jax.Array, carry: Any) -> Any:
        later, sum_a, sum_d, *sum_bias = carry
        states, steps = token.states(first, h)
        for i in reversed(range(CHUNK)):
            t = first + i
            ut, dt, dyt = token.row(token.u, t), steps[i], token.row(dy, t)
            if gate:
                z = token.row(token.z, t)
                open_ = token.sigmoid(z)
                gate[1][t] = (dyt * token.scanned(t, states[i + 1]) * open_ * (1.0 + z * (1.0 - open_))).astype(gate[1].dtype)
                dyt = dyt * (z * open_)
            e = dyt[None] * token.column(token.c, t) + later
            later = token.decay(t, dt) * e
            through = later * states[i]
            dx = jnp.sum(e * token.column(token.b, t), axis=0)
            du[t] = (dt * dx + d * dyt).astype(du.dtype)
            dstep = ut * dx + jnp.sum(through * a, axis=0) * math.log(2)
            if token.bias is not None:
                dstep = dstep * token.sigmoid(token.row(token.dt, t) + token.bias)
                sum_bias = [sum_bias[0] + dstep]
            ddt[t] = dstep.astype(ddt.dtype)
            db[t] = jnp.sum(e * (dt * ut)[None], axis=1)
            dc[t] = jnp.sum(states[i + 1] * dyt[None], axis=1)
            sum_a, sum_d = sum_a + through * dt[None], sum_d + dyt * ut
        return later, sum_a, sum_d, *sum_bias

    def stretch(i: Any, carry: Any) -> Any:
        index = token.u.shape[0] // KEPT - 1 - i

        def chunk_of(j: Any, carry: Any) -> Any:
            number = KEPT // CHUNK - 1 - j
            h = jax.lax.fori_loop(0, number, lambda k, h: token.states(index * KEPT + k * CHUNK, h)[0][-1], kept[index])
            return chunk(index * KEPT + number * CHUNK, h, carry)

        return jax.lax.fori_loop(0, KEPT // CHUNK, chunk_of, carry)

    zeros = jnp.zeros_like(a), jnp.zeros_like(d), *[jnp.zeros_like(d)] * bool(gate)
    dstate[...], da[...], dd[...], *sums = jax.lax.fori_loop(0, token.u.shape[0] // KEPT, stretch, (dlast[...], *zeros))
    if gate:
        gate[0][...] = sums[0]


def _call(
    kernel: Any, name: str, interpret: bool, operands: tuple[jax.Array, ...], given: list[str], more: list[str],
    results: list[tuple[str, Any]],
) -> Any:  # fmt: skip
    """One launch. given, more, results: the layouts of a token's operands, of the others and of what is written, by name."""
    from jax.experimental import pallas as pl  # at import it would cost every start on a CPU
    from jax.experimental.pallas import triton

    (rows, length, channels), states = operands[0].shape, operands[2].shape[0]
    stretches, blocks = length // KEPT, channels // BLOCK
    wide = operands[len(_GIVEN) + 1].shape[2] if len(given) > len(_GIVEN) else channels
    layouts: dict[str, tuple[tuple[int, ...], Any]] = {
        "row": ((rows, length, channels), pl.BlockSpec((None, length, BLOCK), lambda i, j: (i, 0, j))),
        "z": ((rows, length, wide), pl.BlockSpec((None, length, BLOCK), lambda i, j: (i, 0, (wide - channels) // BLOCK + j))),
        "a": ((states, channels), pl.BlockSpec((states, BLOCK), lambda i, j: (0, j))),
        "d": ((channels,), pl.BlockSpec((BLOCK,), lambda i, j: (j,))),
        "read": ((rows, length, states), pl.BlockSpec((None, length, states), lambda i, j: (i, 0, 0))),
        "starts": ((rows, length), pl.BlockSpec((None, length), lambda i, j: (i, 0))),
        "state": ((rows, states, channels), pl.BlockSpec((None, states, BLOCK), lambda i, j: (i, 0, j))),
        "kept": ((rows, stretches, states, channels), pl.BlockSpec((None, stretches, states, BLOCK), lambda i, j: (i, 0, 0, j))),
        "read_of_block": ((rows, blocks, length, states), pl.BlockSpec((None, None, length, states), lambda i, j: (i, j, 0, 0))),
        "d_of_row": ((rows, channels), pl.BlockSpec((None, BLOCK), lambda i, j: (i, j))),
    }
    return pl.pallas_call(
        partial(kernel, len(given), interpret), grid=(rows, blocks), in_specs=[layouts[name][1] for name in (*given, *more)],
        out_specs=[layouts[name][1] for name, _ in results], name=name,
        out_shape=[jax.ShapeDtypeStruct(layouts[name][0], dtype) for name, dtype in results], interpret=interpret,
        compiler_params=None if interpret else triton.CompilerParams(num_warps=1, num_stages=1),
    )(*operands)  # fmt: skip


_GIVEN = ["row", "row", "a", "read", "read", "d", "starts"]
_GATE = ["d", "z"]


def _forward(interpret: bool, keep: bool, *operands: Any) -> Any:
    *given, gate, state = operands
    results = [("row", operands[0].dtype if gate else jnp.float32), ("state", jnp.float32), *[("kept", jnp.float32)] * keep]
    names = [*_GIVEN, *_GATE[: len(gate)]]
    return _call(_scan_forward_kernel, "scan_forward", interpret, (*given, *gate, state), names, ["state"], results)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(interpret: bool, *operands: Any) -> tuple[jax.Array, jax.Array]:
    y, last = _forward(interpret, False, *operands)
    return y, last


def _scan_forward(interpret: bool, *operands: Any) -> Any:
    # The kept states have no name: a policy that keeps what is named recomputes them, they are larger than all else that it keeps.
    y, last, kept = _forward(interpret, True, *operands)
    return (y, last), (*operands[:-1], kept)


def _scan_backward(interpret: bool, residuals: Any, cotangents: Any) -> Any:
    *given, gate, kept = residuals
    u, dt, _, b, c = given[:5]
    names = ["row", "row", "state", "read_of_block", "read_of_block", "d_of_row", "state"]
    dtypes = [u.dtype, dt.dtype, *[jnp.float32] * 5]
    if gate:
        names, dtypes = [*names, "d_of_row", "row"], [*dtypes, jnp.float32, gate[1].dtype]
    du, ddt, da, db, dc, dd, dstate, *rest = _call(
        _scan_backward_kernel, "scan_backward", interpret, (*given, *gate, kept, *cotangents), [*_GIVEN, *_GATE[: len(gate)]],
        ["kept", "row", "state"], list(zip(names, dtypes, strict=True)),
    )  # fmt: skip
    dgate = (rest[0].sum(0), jnp.pad(rest[1], ((0, 0), (0, 0), (gate[1].shape[2] - u.shape[2], 0)))) if gate else ()
    return du, ddt, da.sum(0), db.sum(1).astype(b.dtype), dc.sum(1).astype(c.dtype), dd.sum(0), None, dgate, dstate


_scan.defvjp(_scan_forward, _scan_backward)
