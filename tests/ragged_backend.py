"""A backend made of XLA's own `ragged_dot`, which it expands to the dense product on a CPU: what the bound on FLOPs must notice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moejax.models.ops.grouped.expert import Gradients, LoRAWeights, Plan, Projection, beside, matrices, weights_of

_DIMENSIONS = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)


def ragged_dot(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """y[m] = W[e(m)] x[m]: [M, I], [E, O, I] -> [M, O]; rows behind the last group are zero."""
    return jax.lax.ragged_dot_general(x, w, sizes, _DIMENSIONS)


def _mlp(plan: Plan, x: jax.Array, p: jax.Array, sizes: jax.Array, ws: list[jax.Array], pairs: Any, key: Any) -> jax.Array:
    live = jnp.arange(x.shape[0]) < jnp.sum(sizes)

    def low_rank(i: int, rows: jax.Array) -> jax.Array:
        if plan.dropout and key is not None:
            own = jax.vmap(jax.random.fold_in, (0, None))(jax.random.wrap_key_data(key), i)
            keep = jax.vmap(lambda k: jax.random.bernoulli(k, 1 - plan.dropout, rows.shape[1:]))(own)
            rows = jnp.where(keep, rows / (1 - plan.dropout), jnp.zeros((), rows.dtype))
        return ragged_dot(rows, pairs[i].a.astype(x.dtype), sizes)

    low: list[jax.Array] = []  # an A's rows, also of the projection behind it that shares the A

    def project(i: int, rows: jax.Array) -> jax.Array:
        with jax.named_scope(plan.names[i]):
            y = ragged_dot(rows, ws[i], sizes)
            if pairs[i] is None:
                return y
            with jax.named_scope("lora"):
                if pairs[i].a is not None:
                    low.append(low_rank(i, rows))
                return y + ragged_dot(low[-1], pairs[i].b.astype(x.dtype), sizes)

    hidden = [project(i, x) for i in range(len(ws) - 1)]
    with jax.named_scope("act"):
        act = jnp.where(live[:, None], plan.activation(*hidden) * p[:, None], jnp.zeros((), x.dtype))
    return project(len(ws) - 1, act)


def forward(
    plan: Plan, keep: bool, x: jax.Array, p: jax.Array, sizes: jax.Array, inputs: Sequence[Projection], output: Projection, key: Any
) -> tuple[jax.Array, list[jax.Array]]:
    """The output rows [M, O]. Hidden rows are never kept: the backward pass computes them again."""
    return _mlp(plan, x, p, sizes, matrices(plan, weights_of(inputs, output), x.dtype), beside(inputs, output, x.dtype).pairs, key), []


def backward(plan: Plan, operands: Any, kept: list[jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array, Gradients]:
    """dx, dp, and the gradients of weights and adapters, [E, …]; sums over rows in XLA's accumulator, rounded to the compute dtype."""
    x, p, sizes, inputs, output, key = operands
    ws = matrices(plan, weights_of(inputs, output), x.dtype)

    def of(x: jax.Array, p: jax.Array, pairs: Any, trained: Any) -> jax.Array:
        return _mlp(plan, x, p, sizes, ws if trained is None else trained, pairs, key)

    live = jnp.arange(x.shape[0]) < jnp.sum(sizes)
    _, pull = jax.vjp(of, x, p, beside(inputs, output, x.dtype).pairs, ws if plan.trainable else None)
    dx, dp, dpairs, dws = pull(jnp.where(live[:, None], dy, jnp.zeros((), dy.dtype)))
    transposed = [None if d is None else LoRAWeights(d.a, jnp.swapaxes(d.b, 1, 2)) for d in dpairs]
    return dx, dp, Gradients(dws, transposed)
