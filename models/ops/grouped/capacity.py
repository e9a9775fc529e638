"""Backend `capacity`: every expert gets the same number of rows, so that one batched product serves them all.

A few capacities are compiled, and the largest load of the step chooses (`lax.switch`): the smallest that holds it. A load above them all
goes through the loop, so nothing is ever dropped, and no program for E times all rows has to exist. Arrays are multiplied in one batch;
frozen weights that must first be dequantized, or sliced from a stack of layers, one expert's at a time: a batch of them would be E
dequantized matrices at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moejax.models.ops.grouped import loop as experts_loop
from moejax.models.ops.grouped.expert import Expert, Gradients, Plan, Projection, matrices, pairs_of


def _branch(plan: Plan, sizes: jax.Array) -> jax.Array:
    """The first capacity that holds the largest group; their number if none does."""
    return jnp.sum(jnp.max(sizes) > jnp.asarray(plan.capacities, jnp.int32), dtype=jnp.int32)


def _each_expert(
    plan: Plan, body: Callable[..., Any], inputs: Sequence[Projection], output: Projection, key: Any, dtype: Any, *xs: Any
) -> Any:
    """body(expert, *its slices of xs), the results stacked [E, …]: at once where the weights are arrays, else one by one."""
    pairs = pairs_of(inputs, output)
    if all(isinstance(p.weight, jax.Array) for p in (*inputs, output)):
        whole = matrices(plan, inputs, output, dtype)
        return jax.vmap(lambda ws, pairs, *xs: body(Expert(plan, ws, pairs, key, dtype), *xs))(whole, pairs, *xs)

    def step(_: None, slices: Any) -> Any:
        e, pairs, *xs = slices
        return None, body(Expert(plan, matrices(plan, inputs, output, dtype, e), pairs, key, dtype), *xs)

    return jax.lax.scan(step, None, (jnp.arange(xs[0].shape[0]), pairs, *xs))[1]


class _Places:
    """Where sorted rows stand in [E, C] and back. Rows of a place that its expert has no use for are the next group's."""

    def __init__(self, sizes: jax.Array, capacity: int, rows: int):
        ends = jnp.cumsum(sizes)
        self.start = ends - sizes
        self.row = self.start[:, None] + jnp.arange(capacity)  # [E, C]
        self.inside = jnp.arange(capacity) < sizes[:, None]
        number = jnp.arange(rows, dtype=jnp.int32)
        expert = jnp.sum(number[:, None] >= ends, axis=1)  # [M]; E for padding rows
        self.live = number < ends[-1]
        self.place = expert * capacity + number - self.start[jnp.minimum(expert, sizes.shape[0] - 1)]

    def spread(self, x: jax.Array, row: jax.Array) -> jax.Array:
        """Sorted rows x [M, …] -> an expert's rows [C, …]; row: int32 [C]."""
        return jnp.take(x, row, axis=0, mode="clip")

    def gather(self, y: jax.Array) -> jax.Array:
        """[E, C, …] -> sorted rows [M, …], padding rows zero."""
        flat = jnp.take(y.reshape(-1, *y.shape[2:]), self.place, axis=0, mode="clip")
        return jnp.where(self.live.reshape(-1, *[1] * (flat.ndim - 1)), flat, jnp.zeros((), y.dtype))


def forward(
    plan: Plan, keep: bool, x: jax.Array, p: jax.Array, sizes: jax.Array, inputs: Sequence[Projection], output: Projection, key: Any
) -> tuple[jax.Array, list[jax.Array]]:
    """The output rows [M, O], and the hidden rows [M, F] if `keep`."""

    def with_capacity(capacity: int) -> Callable[..., Any]:
        def branch(x: jax.Array, p: jax.Array, sizes: jax.Array, inputs: Any, output: Any) -> Any:
            places = _Places(sizes, capacity, x.shape[0])

            def body(expert: Expert, row: jax.Array, start: jax.Array) -> Any:
                y, hidden = expert.forward(places.spread(x, row), places.spread(p, row), start)
                return y, hidden if keep else []

            return jax.tree.map(places.gather, _each_expert(plan, body, inputs, output, key, x.dtype, places.row, places.start))

        return branch

    def loop(x: jax.Array, p: jax.Array, sizes: jax.Array, inputs: Any, output: Any) -> Any:
        return experts_loop.forward(plan, keep, x, p, sizes, inputs, output, key)

    branches = [*(with_capacity(c) for c in plan.capacities), loop]
    y, kept = jax.lax.switch(_branch(plan, sizes), branches, x, p, sizes, inputs, output)
    return y, kept


def backward(plan: Plan, operands: Any, kept: list[jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array, Gradients]:
    """dx, dp, and the gradients of weights and adapters, [E, …] in fp32."""
    *arrays, key = operands

    def with_capacity(capacity: int) -> Callable[..., Any]:
        def branch(kept: Any, dy: jax.Array, x: jax.Array, p: jax.Array, sizes: jax.Array, inputs: Any, output: Any) -> Any:
            places = _Places(sizes, capacity, x.shape[0])

            def body(expert: Expert, row: jax.Array, inside: jax.Array, start: jax.Array) -> Any:
                dy_rows = jnp.where(inside[:, None], places.spread(dy, row), jnp.zeros((), dy.dtype))
                hidden = [places.spread(k, row) for k in kept] if plan.keep else None
                return expert.backward(places.spread(x, row), places.spread(p, row), dy_rows, start, hidden)

            xs = (places.row, places.inside, places.start)
            dx, dp, gradients = _each_expert(plan, body, inputs, output, key, x.dtype, *xs)
            return places.gather(dx), places.gather(dp), gradients

        return branch

    def loop(kept: Any, dy: jax.Array, *operands: Any) -> Any:
        return experts_loop.backward(plan, (*operands, key), kept, dy)

    branches = [*(with_capacity(c) for c in plan.capacities), loop]
    dx, dp, gradients = jax.lax.switch(_branch(plan, arrays[2]), branches, kept, dy, *arrays)
    return dx, dp, gradients
