"""Backend `ragged`: all rows in one product, each by its expert's matrix, by XLA's `ragged_dot`. Of a TPU, whose compiler has it: there the
FLOPs are the useful ones. Elsewhere XLA expands it to the product with every expert, so that a run refuses it (`refusal`). It does so on a
TPU too where the sum is over a group's rows, and pads matrices of few columns there: gradients and adapters are by jax's kernels
(`megablox`).

A layer's matrices are dequantized at once, as `capacity` has them. No row is padded and none is dropped, for any routing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax.models.ops import choice, tiles
from moejax.models.ops.grouped.expert import Beside, Expert, Gradients, Plan, Projection, beside, matrices, weights_of
from moejax.models.ops.linear import Weight

Made = Callable[[Plan, Sequence[Weight], jax.Array, int, Any], tuple[Any, Sequence[Any]]]


def refusal(platform: str) -> str | None:
    """Why it is of no use on a platform (as `choice.here` says it); None on a TPU."""
    return None if choice.is_tpu(platform) else "for a TPU: elsewhere XLA computes every row's product with every expert"


def _dimensions(contracted: tuple[int, int], of_groups: Sequence[int]) -> jax.lax.RaggedDotDimensionNumbers:
    left, right = contracted
    return jax.lax.RaggedDotDimensionNumbers((((left,), (right,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=of_groups)


class _Products(NamedTuple):
    """The functions of `dot`, of rows [M, …] sorted by expert and matrices [E, …]. sizes: int32 [E]. Behind the last group rows are zero on
    a CPU, and on a TPU what stood there."""

    sizes: jax.Array

    def _product(self, a: jax.Array, b: jax.Array, contracted: tuple[int, int], of_groups: Sequence[int], dtype: Any) -> jax.Array:
        return jax.lax.ragged_dot_general(a, b, self.sizes, _dimensions(contracted, of_groups), preferred_element_type=dtype)

    def forward(self, rows: jax.Array, w: jax.Array) -> jax.Array:
        """[M, I], [E, O, I] -> [M, O]."""
        by_xla = partial(self._product, contracted=(1, 2), of_groups=[0], dtype=rows.dtype)
        if w.shape[1] >= tiles.LANES:
            return by_xla(rows, w)
        found: jax.Array = jax.lax.platform_dependent(rows, w, tpu=partial(kernel_narrow, self.sizes), default=by_xla)
        return found

    def backward(self, dy: jax.Array, w: jax.Array) -> jax.Array:
        """[M, O], [E, O, I] -> [M, I]."""
        if w.shape[2] < tiles.LANES:
            return self.forward(dy, w.swapaxes(1, 2))
        return self._product(dy, w, (1, 1), [0], dy.dtype)

    def gradient(self, dy: jax.Array, rows: jax.Array) -> jax.Array:
        """[M, O], [M, I] -> fp32 [E, O, I]."""
        by_xla = partial(self._product, contracted=(0, 0), of_groups=[], dtype=jnp.float32)
        found: jax.Array = jax.lax.platform_dependent(dy, rows, tpu=partial(kernel_gradient, self.sizes), default=by_xla)
        return found

    def with_bias(self, dy: jax.Array, bias: jax.Array) -> jax.Array:
        """bias: of each row's expert, [M, O]."""
        return jnp.sum(dy * bias, axis=-1)

    def bias_gradient(self, dy: jax.Array, by: jax.Array) -> jax.Array:
        """fp32 [E, O]."""
        return self.gradient(by[:, None], dy)[:, 0]


def kernel_gradient(sizes: jax.Array, dy: jax.Array, rows: jax.Array, *, interpret: bool = False) -> jax.Array:
    """dyᵀ x of every group: [M, O], [M, I] -> fp32 [E, O, I]. interpret: on a CPU, for tests."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm  # at import it would cost every start

    (dy, rows), tile = _whole_tiles(dy, rows)
    o, i = dy.shape[1], rows.shape[1]
    found: jax.Array = tgmm(dy.T, rows, sizes, jnp.float32, (tile, min(o, 512), min(i, 1024)), interpret=interpret)
    return found


def kernel_narrow(sizes: jax.Array, rows: jax.Array, w: jax.Array, *, interpret: bool = False) -> jax.Array:
    """x Wᵀ of every group for few columns: [M, I], [E, R, I] -> [M, R]; the matrices stay wide in memory. interpret: as above."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    m, (padded, *_), tile = rows.shape[0], *_whole_tiles(rows)
    tiling = (tile, min(w.shape[2], 1024), w.shape[1])
    found: jax.Array = gmm(padded, w, sizes, rows.dtype, tiling, transpose_rhs=True, interpret=interpret)
    return found[:m]


def _whole_tiles(*arrays: jax.Array) -> tuple[list[jax.Array], int]:
    """Arrays [M, …] filled up to whole tiles of rows, and the rows of a tile."""
    m = arrays[0].shape[0]
    more = -m % choice.TPU_ROWS
    tile = next(t for t in (4 * choice.TPU_ROWS, 2 * choice.TPU_ROWS, choice.TPU_ROWS) if (m + more) % t == 0)
    return [jnp.pad(a, ((0, more), (0, 0))) if more else a for a in arrays], tile


def _made(plan: Plan, weights: Sequence[Weight], sizes: jax.Array, rows: int, dtype: Any) -> tuple[Any, Sequence[Any]]:
    """What multiplies, and the matrices as it takes them."""
    return _Products(sizes), matrices(plan, weights, dtype)


def _expert(
    plan: Plan, x: jax.Array, sizes: jax.Array, inputs: Sequence[Projection], output: Projection, made: Made
) -> tuple[Expert, jax.Array]:
    """All experts as one, whose biases are of each row's; and which rows are of any, bool [M]."""
    others, ends = beside(inputs, output, x.dtype), jnp.cumsum(sizes)
    row = jnp.arange(x.shape[0])
    biases = others.biases
    if any(b is not None for b in biases):
        of_row = jnp.sum(row[:, None] >= ends, axis=1)
        biases = tuple(None if b is None else jnp.take(b, of_row, axis=0, mode="clip") for b in biases)
    products, ws = made(plan, weights_of(inputs, output), sizes, x.shape[0], x.dtype)
    return Expert(plan, ws, Beside(others.pairs, biases), products), row < ends[-1]


def _live(live: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.where(live.reshape(-1, *[1] * (rows.ndim - 1)), rows, jnp.zeros((), rows.dtype))


def forward(
    plan: Plan, keep: bool, x: jax.Array, p: jax.Array, sizes: jax.Array, inputs: Sequence[Projection], output: Projection, keys: Any,
    made: Made = _made,
) -> tuple[jax.Array, list[jax.Array]]:  # fmt: skip
    """The output rows [M, O], and the hidden rows [M, F] if `keep`. made: another backend's `_made`."""
    expert, live = _expert(plan, x, sizes, inputs, output, made)
    y, hidden = expert.forward(x, p, keys)
    return _live(live, y), hidden if keep else []


def backward(
    plan: Plan, operands: Any, kept: list[jax.Array], dy: jax.Array, made: Made = _made
) -> tuple[jax.Array, jax.Array, Gradients]:
    """dx, dp, and the gradients of weights and adapters, [E, …] in fp32."""
    x, p, sizes, inputs, output, keys = operands
    expert, live = _expert(plan, x, sizes, inputs, output, made)
    dx, dp, gradients = expert.backward(x, p, dy, keys, kept if plan.keep else None)
    return _live(live, dx), _live(live, dp), gradients
