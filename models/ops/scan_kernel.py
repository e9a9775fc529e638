"""The selective scan as two Pallas kernels for GPUs (Triton's lowering): states stay in registers, arrays are read and written once.

A program is one row and `BLOCK` channels, and goes through time. Forward it writes y and, for the gradient, the state before every `KEPT`
tokens: 4 N / KEPT bytes a token and channel, 97 MB a layer of 16 x 512 x 2944. Backward it runs through those stretches in reverse, and
through the chunks of `CHUNK` tokens in them: a chunk's states are computed again from the stretch's first. Sums over time (A, D) stay in
registers, sums over channels (B, C) are written by program and added up by XLA: no atomics, the same bits every time.

x = dt·u and D·u are computed inside. The gate and softplus are not: four lanes hold a channel, each would compute them again.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

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
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """`selective_scan.selective_scan` with all operands there. u, b, c in any float dtype; dt, a, d, state: fp32. interpret: on a CPU,
    for tests. Filled up to whole blocks: dt = 0 leaves a state as it is, b = c = 0 hides one."""
    length, (channels, states) = u.shape[1], a.shape
    t, n, w = -length % KEPT, (1 << (states - 1).bit_length()) - states, -channels % BLOCK

    def whole(x: jax.Array, *more: int) -> jax.Array:
        return jnp.pad(x, [(0, by) for by in more]) if any(more) else x

    row, read = (0, t, w), (0, t, n)
    y, last = _scan(
        interpret, whole(u, *row), whole(dt, *row), whole(a.T, n, w), whole(b, *read), whole(c, *read), whole(d, w),
        whole(starts.astype(jnp.int32), 0, t), whole(jnp.swapaxes(state, 1, 2), 0, n, w),
    )  # fmt: skip
    return y[:, :length, :channels], jnp.swapaxes(last[:, :states, :channels], 1, 2)


def _decay(t: Any, dt: Any, starts: Any, a: jax.Array) -> jax.Array:
    """exp(dt A), zero at starts: [N, D]. a: A log2 e. exp2 is one instruction, exp seven."""
    return jnp.exp2(jnp.where(starts[t] != 0, FORGET, dt[t])[None] * a)


def _column(ref: Any, t: Any) -> jax.Array:
    return ref[t].astype(jnp.float32)[:, None]


def _states(first: Any, h: jax.Array, u: Any, dt: Any, a: jax.Array, b: Any, starts: Any) -> list[jax.Array]:
    """Of `CHUNK` tokens from `first` on: the state before and after each."""
    found = [h]
    for t in (first + i for i in range(CHUNK)):
        x = dt[t] * u[t].astype(jnp.float32)
        found.append(_decay(t, dt, starts, a) * found[-1] + x[None] * _column(b, t))
    return found


def _scan_forward_kernel(u, dt, a_ref, b, c, d_ref, starts, state, y, last, *kept):  # type: ignore[no-untyped-def]
    a, d = a_ref[...] * math.log2(math.e), d_ref[...]

    def chunk(first: Any, h: jax.Array) -> jax.Array:
        after = _states(first, h, u, dt, a, b, starts)[1:]
        for i, h in enumerate(after):
            y[first + i] = jnp.sum(h * _column(c, first + i), axis=0) + d * u[first + i].astype(jnp.float32)
        return after[-1]

    def stretch(index: Any, h: jax.Array) -> jax.Array:
        if kept:
            kept[0][index] = h
        return jax.lax.fori_loop(0, KEPT // CHUNK, lambda i, h: chunk(index * KEPT + i * CHUNK, h), h)

    last[...] = jax.lax.fori_loop(0, u.shape[0] // KEPT, stretch, state[...])


def _scan_backward_kernel(u, dt, a_ref, b, c, d_ref, starts, kept, dy, dlast, du, ddt, da, db, dc, dd, dstate):  # type: ignore[no-untyped-def]
    """With e_t = ∂/∂h_t: e_t = C_t dy_t + g_{t+1} e_{t+1}; `later` is that last term."""
    a, d = a_ref[...] * math.log2(math.e), d_ref[...]

    def chunk(first: Any, h: jax.Array, carry: Any) -> Any:
        later, sum_a, sum_d = carry
        states = _states(first, h, u, dt, a, b, starts)
        for i in reversed(range(CHUNK)):
            t = first + i
            ut, dyt = u[t].astype(jnp.float32), dy[t]
            e = dyt[None] * _column(c, t) + later
            later = _decay(t, dt, starts, a) * e
            through = later * states[i]
            dx = jnp.sum(e * _column(b, t), axis=0)
            du[t] = (dt[t] * dx + d * dyt).astype(du.dtype)
            ddt[t] = ut * dx + jnp.sum(through * a, axis=0) * math.log(2)
            db[t] = jnp.sum(e * (dt[t] * ut)[None], axis=1)
            dc[t] = jnp.sum(states[i + 1] * dyt[None], axis=1)
            sum_a, sum_d = sum_a + through * dt[t][None], sum_d + dyt * ut
        return later, sum_a, sum_d

    def stretch(i: Any, carry: Any) -> Any:
        index = u.shape[0] // KEPT - 1 - i

        def chunk_of(j: Any, carry: Any) -> Any:
            number = KEPT // CHUNK - 1 - j
            h = jax.lax.fori_loop(
                0, number, lambda k, h: _states(index * KEPT + k * CHUNK, h, u, dt, a, b, starts)[-1], kept[index]
            )
            return chunk(index * KEPT + number * CHUNK, h, carry)

        return jax.lax.fori_loop(0, KEPT // CHUNK, chunk_of, carry)

    zeros = jnp.zeros_like(a), jnp.zeros_like(d)
    dstate[...], da[...], dd[...] = jax.lax.fori_loop(0, u.shape[0] // KEPT, stretch, (dlast[...], *zeros))


def _call(kernel: Any, interpret: bool, operands: tuple[jax.Array, ...], given: list[str], results: list[tuple[str, Any]]) -> Any:
    """One launch. given, results: the layouts of operands and of what is written, by name."""
    from jax.experimental import pallas as pl  # at import it would cost every start on a CPU
    from jax.experimental.pallas import triton

    (rows, length, channels), states = operands[0].shape, operands[2].shape[0]
    stretches, blocks = length // KEPT, channels // BLOCK
    layouts: dict[str, tuple[tuple[int, ...], Any]] = {
        "row": ((rows, length, channels), pl.BlockSpec((None, length, BLOCK), lambda i, j: (i, 0, j))),
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
        kernel, grid=(rows, blocks), in_specs=[layouts[name][1] for name in given], out_specs=[layouts[name][1] for name, _ in results],
        out_shape=[jax.ShapeDtypeStruct(layouts[name][0], dtype) for name, dtype in results], interpret=interpret,
        compiler_params=None if interpret else triton.CompilerParams(num_warps=1, num_stages=1),
        name=kernel.__name__.strip("_").removesuffix("_kernel"),
    )(*operands)  # fmt: skip


_GIVEN = ["row", "row", "a", "read", "read", "d", "starts"]


def _forward(interpret: bool, keep: bool, operands: tuple[jax.Array, ...]) -> Any:
    results = [("row", jnp.float32), ("state", jnp.float32), *[("kept", jnp.float32)] * keep]
    return _call(_scan_forward_kernel, interpret, operands, [*_GIVEN, "state"], results)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(interpret: bool, *operands: jax.Array) -> tuple[jax.Array, jax.Array]:
    y, last = _forward(interpret, False, operands)
    return y, last


def _scan_forward(interpret: bool, *operands: jax.Array) -> Any:
    # The kept states have no name: a policy that keeps what is named recomputes them, they are larger than all else that it keeps.
    y, last, kept = _forward(interpret, True, operands)
    return (y, last), (*operands[:-1], kept)


def _scan_backward(interpret: bool, residuals: Any, cotangents: Any) -> Any:
    u, b, c = (residuals[number] for number in (0, 3, 4))
    names = ["row", "row", "state", "read_of_block", "read_of_block", "d_of_row", "state"]
    results = [(name, u.dtype if number == 0 else jnp.float32) for number, name in enumerate(names)]
    du, ddt, da, db, dc, dd, dstate = _call(
        _scan_backward_kernel, interpret, (*residuals, *cotangents), [*_GIVEN, "kept", "row", "state"], results
    )
    return du, ddt, da.sum(0), db.sum(1).astype(b.dtype), dc.sum(1).astype(c.dtype), dd.sum(0), None, dstate


_scan.defvjp(_scan_forward, _scan_backward)
