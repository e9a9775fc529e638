"""Backend `capacity`: few launches for many experts. A layer's matrices are dequantized at once, and one batched product takes the first
`plan.capacity` rows of every expert.

The rows that a larger group has beyond them go through tiles of one expert each: nothing is dropped, for any routing. The price is
memory (all experts' dequantized matrices, [E, capacity, …] rows) and the padding of small groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moejax.models.ops.grouped.expert import Expert, Gradients, Plan, Projection, beside, matrices, weights_of


class _Places:
    """Where sorted rows stand in [E, C] and back. Rows of a place that its expert has no use for are the next group's."""

    def __init__(self, plan: Plan, sizes: jax.Array, rows: int):
        self.plan, self.sizes, self.ends = plan, sizes, jnp.cumsum(sizes)
        self.start = self.ends - sizes
        within = jnp.arange(plan.capacity)
        self.row, self.inside = self.start[:, None] + within, within < sizes[:, None]  # [E, C]
        number = jnp.arange(rows, dtype=jnp.int32)
        expert = jnp.minimum(jnp.sum(number[:, None] >= self.ends, axis=1), sizes.shape[0] - 1)  # [M]
        offset = number - self.start[expert]
        self.place = expert * plan.capacity + jnp.minimum(offset, plan.capacity - 1)
        self.live = (number < self.ends[-1]) & (offset < plan.capacity)

    def gather(self, y: jax.Array) -> jax.Array:
        """[E, C, …] -> sorted rows [M, …], zero where the batch has none."""
        flat = jnp.take(y.reshape(-1, *y.shape[2:]), self.place, axis=0, mode="clip")
        return jnp.where(self.live.reshape(-1, *[1] * (flat.ndim - 1)), flat, jnp.zeros((), y.dtype))

    def rest(self, body: Callable[..., Any], state: Any) -> Any:
        """body(expert, first row, which of the rows are the expert's [tile], state) for each tile of rows beyond the capacity."""
        capacity, tile = self.plan.capacity, self.plan.tile
        tiles = -(-jnp.maximum(self.sizes - capacity, 0) // tile)
        ends = jnp.cumsum(tiles)

        def step(i: jax.Array, state: Any) -> Any:
            e = jnp.sum(ends <= i)
            first = capacity + (i - ends[e] + tiles[e]) * tile
            return body(e, self.start[e] + first, first + jnp.arange(tile) < self.sizes[e], state)

        with jax.named_scope("tiles"):
            return jax.lax.fori_loop(0, ends[-1], step, state)


def _spread(x: Any, row: jax.Array) -> Any:
    """Sorted rows x [M, …] -> an expert's rows [C, …], or none of none; row: int32 [C]."""
    return None if x is None else jnp.take(x, row, axis=0, mode="clip")


def _rows(array: Any, row: jax.Array, live: jax.Array) -> Any:
    return None if array is None else jax.lax.dynamic_slice_in_dim(array, row, live.shape[0])


def _put(array: jax.Array, rows: jax.Array, row: jax.Array, live: jax.Array) -> jax.Array:
    """Over the expert's own rows alone: those behind them are the next group's, and done."""
    keep = live.reshape(-1, *[1] * (rows.ndim - 1))
    return jax.lax.dynamic_update_slice_in_dim(array, jnp.where(keep, rows, _rows(array, row, live)), row, 0)


def forward(
    plan: Plan, keep: bool, x: jax.Array, p: jax.Array, sizes: jax.Array, inputs: Sequence[Projection], output: Projection, keys: Any
) -> tuple[jax.Array, list[jax.Array]]:
    """The output rows [M, O], and the hidden rows [M, F] if `keep`."""
    places = _Places(plan, sizes, x.shape[0])
    experts = (matrices(plan, weights_of(inputs, output), x.dtype), beside(inputs, output, x.dtype))

    def through(expert: Any, rows: jax.Array, p: jax.Array, of_rows: Any) -> list[jax.Array]:
        weights, others = expert
        y, hidden = Expert(plan, weights, others).forward(rows, p, of_rows)
        return [y, *hidden] if keep else [y]

    def batch(expert: Any, row: jax.Array) -> list[jax.Array]:
        return through(expert, _spread(x, row), _spread(p, row), _spread(keys, row))

    def tile(e: jax.Array, row: jax.Array, live: jax.Array, found: list[jax.Array]) -> list[jax.Array]:
        parts = through(jax.tree.map(lambda a: a[e], experts), _rows(x, row, live), _rows(p, row, live), _rows(keys, row, live))
        return [_put(rows, part, row, live) for rows, part in zip(found, parts, strict=True)]

    y, *hidden = places.rest(tile, [places.gather(rows) for rows in jax.vmap(batch)(experts, places.row)])
    return y, hidden


def backward(plan: Plan, operands: Any, kept: list[jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array, Gradients]:
    """dx, dp, and the gradients of weights and adapters, [E, …] in fp32."""
    x, p, sizes, inputs, output, keys = operands
    places = _Places(plan, sizes, x.shape[0])
    experts = (matrices(plan, weights_of(inputs, output), x.dtype), beside(inputs, output, x.dtype))

    def through(expert: Any, read: Callable[[Any], Any], live: jax.Array) -> Any:
        dy_rows = jnp.where(live[:, None], read(dy), jnp.zeros((), dy.dtype))
        hidden = [read(k) for k in kept] if plan.keep else None
        weights, others = expert
        return Expert(plan, weights, others).backward(read(x), read(p), dy_rows, read(keys), hidden)

    def batch(expert: Any, row: jax.Array, live: jax.Array) -> Any:
        return through(expert, lambda array: _spread(array, row), live)

    def tile(e: jax.Array, row: jax.Array, live: jax.Array, state: Any) -> Any:
        dx, dp, sums = state
        expert = jax.tree.map(lambda a: a[e], experts)
        dx_rows, dp_rows, parts = through(expert, lambda array: _rows(array, row, live), live)
        return _put(dx, dx_rows, row, live), _put(dp, dp_rows, row, live), jax.tree.map(lambda s, g: s.at[e].add(g), sums, parts)

    dx, dp, sums = jax.vmap(batch)(experts, places.row, places.inside)
    result: tuple[jax.Array, jax.Array, Gradients] = places.rest(tile, (places.gather(dx), places.gather(dp), sums))
    return result
