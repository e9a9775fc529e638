"""Backend `loop`: one expert after the other, its group tile by tile.

Neither the hidden activations [M, F] nor the sorted rows of tokens [M, D] ever exist as a whole: a tile gathers its own. What it gives is
written in the order of the sorted rows, so a tile that runs over the end of its group only writes rows that the next group overwrites: no
mask, no token dropped for any routing; the price is the padding of each group's last tile.

Weights in the host's memory come one expert ahead: the codes of the next one are on the bus while this one's rows are multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax.models.ops.grouped.expert import Expert, Gradients, Plan, Projection, beside, matrices, weights_of
from moejax.models.ops.linear import in_host, is_spread, out_size, part


class Tokens(NamedTuple):
    """Rows that are sorted as they are read. rows: [N, D]; token: int32 [M], that of each sorted row, N where it is padding, which is zero;
    position: int32 [N, K], the sorted row of each choice."""

    rows: jax.Array
    token: jax.Array
    position: jax.Array

    @property
    def choices(self) -> int:
        """Their axis of position."""
        return 1

    def added_up(self, sorted_rows: jax.Array) -> jax.Array:
        """The sorted rows of each token: [M, O] -> [N, O]. The transpose of sorting them."""
        with jax.named_scope("combine"):
            return jnp.take(sorted_rows, self.position, axis=0, mode="clip").sum(axis=self.choices)


class ChoicesFirst(Tokens):
    """The same with position [K, N]: see `matmul.ChoicesFirst`."""

    @property
    def choices(self) -> int:
        return 0


def _rows(array: Any, row: jax.Array, count: int) -> Any:
    """Of an array, of tokens, or of none."""
    if not isinstance(array, Tokens):
        return None if array is None else jax.lax.dynamic_slice_in_dim(array, row, count)
    with jax.named_scope("dispatch"):
        return jnp.take(array.rows, _rows(array.token, row, count), axis=0, mode="fill", fill_value=0)


def _put(array: jax.Array, rows: jax.Array, row: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(array, rows, row, 0)


def _over_tiles(plan: Plan, start: jax.Array, size: jax.Array, body: Callable[..., Any], state: Any) -> Any:
    """body(row, first, count, state) for each tile of a group: large tiles while more than half of one is left, then small ones.

    `first`: the number of the group's rows before the tile. Large tiles read the weights less often, small ones pad less.
    """
    one_size = plan.small_tile == plan.tile
    whole = (size + (plan.tile - 1 if one_size else plan.tile // 2)) // plan.tile

    def tiles(count: int, offset: Any) -> Callable[..., Any]:
        return lambda i, state: body(start + offset + i * count, offset + i * count, count, state)

    with jax.named_scope("tiles"):
        state = jax.lax.fori_loop(0, whole, tiles(plan.tile, 0), state)
    if one_size:
        return state
    rest = jnp.maximum(size - whole * plan.tile, 0)
    with jax.named_scope("small_tiles"):
        return jax.lax.fori_loop(0, -(-rest // plan.small_tile), tiles(plan.small_tile, whole * plan.tile), state)


def _over_experts(
    plan: Plan, body: Callable[..., Any], state: Any, sizes: jax.Array, projections: tuple[Any, Any], dtype: Any,
    most: int | None = None,
) -> Any:  # fmt: skip
    """Scan `body(state, expert, first row, rows)`. Weights are sliced and dequantized inside, where they are used.

    most: no more experts than this many can have rows, and no more are visited; of weights that are spread over devices all are, since each
    device has rows for others.
    """
    weights, others = weights_of(*projections), beside(*projections, dtype)
    if plan.prefetch == "layer" and any(map(in_host, weights)):
        weights = [part(w) for w in weights]

    def one(state: Any, xs: Any, held: Any = None) -> Any:
        e, start, size, others = xs
        found = matrices(plan, weights, dtype, e) if held is None else matrices(plan, held, dtype)
        return body(state, Expert(plan, found, others), start, size)

    xs = (jnp.arange(sizes.shape[0]), jnp.cumsum(sizes) - sizes, sizes, others)
    if most is not None and most < sizes.shape[0] and not any(map(is_spread, weights)):
        # In their order: a tile may write over the rows behind its group, which later experts write again.
        visited = jnp.sort(jax.lax.top_k(sizes, most)[1])
        xs = jax.tree.map(lambda a: a[visited], xs)
    if plan.prefetch != "experts" or not any(map(in_host, weights)):
        return jax.lax.scan(one, state, xs)

    def ahead(carry: Any, xs: Any) -> Any:
        (state, held), (own, following) = carry, xs
        coming = [part(w, following) for w in weights]
        state, out = one(state, own, held)
        return (state, coming), out

    # The last one stands outside: in the loop it would fetch an expert that nobody uses.
    but_last, last = jax.tree.map(lambda a: a[:-1], xs), jax.tree.map(lambda a: a[-1], xs)
    (state, held), outs = jax.lax.scan(ahead, (state, [part(w, xs[0][0]) for w in weights]), (but_last, xs[0][1:]))
    state, out = one(state, last, held)
    return state, jax.tree.map(lambda several, one: jnp.concatenate([several, one[None]]), outs, out)


def forward(
    plan: Plan, keep: bool, x: Tokens, p: jax.Array, sizes: jax.Array, inputs: Sequence[Projection], output: Projection, keys: Any
) -> tuple[jax.Array, list[jax.Array]]:
    """The tokens' output rows [N, O], and the hidden rows [M, F] if `keep`."""
    dtype, count = x.rows.dtype, p.shape[0]

    def expert(state: Any, expert: Expert, start: jax.Array, size: jax.Array) -> Any:
        def tile(row: jax.Array, _: Any, count: int, state: Any) -> Any:
            y, kept = state
            part, hidden = expert.forward(_rows(x, row, count), _rows(p, row, count), _rows(keys, row, count))
            return _put(y, part, row), [_put(k, h, row) for k, h in zip(kept, hidden, strict=True)] if keep else kept

        return _over_tiles(plan, start, size, tile, state), None

    def empty(projection: Projection) -> jax.Array:
        return jnp.zeros((count, out_size(projection.weight)), dtype)

    state = (empty(output), [empty(p) for p in inputs] if keep else [])
    # While decoding there may be fewer rows than experts: the weights of the others are not touched.
    most = count - plan.tile
    y, kept = _over_experts(plan, expert, state, sizes, (inputs, output), dtype, most)[0]
    return x.added_up(y), kept


def backward(plan: Plan, operands: Any, kept: list[jax.Array], dy: jax.Array) -> tuple[Tokens, jax.Array, Gradients]:
    """dx, dp, and the gradients of weights and adapters, [E, …] in fp32. dy: the tokens' [N, O]."""
    x, p, sizes, inputs, output, keys = operands

    def expert(state: Any, expert: Expert, start: jax.Array, size: jax.Array) -> Any:
        def tile(row: jax.Array, first: jax.Array, count: int, state: Any) -> Any:
            (dx, dp), sums = state
            inside = (first + jnp.arange(count) < size)[:, None]
            dy_rows = jnp.where(inside, _rows(x._replace(rows=dy), row, count), jnp.zeros((), dy.dtype))
            hidden = [_rows(k, row, count) for k in kept] if plan.keep else None
            x_rows, p_rows, of_rows = (_rows(array, row, count) for array in (x, p, keys))
            dx_rows, dp_rows, parts = expert.backward(x_rows, p_rows, dy_rows, of_rows, hidden)
            return (_put(dx, dx_rows, row), _put(dp, dp_rows, row)), jax.tree.map(jnp.add, sums, parts)

        return _over_tiles(plan, start, size, tile, (state, expert.zeros()))

    # Rows of no expert are zero, as their gradient is; so is what a tile gives behind its group, where `dy_rows` is.
    dx = jnp.zeros((p.shape[0], x.rows.shape[1]), x.rows.dtype)
    (dx, dp), gradients = _over_experts(plan, expert, (dx, jnp.zeros_like(p)), sizes, (inputs, output), x.rows.dtype)
    return x._replace(rows=x.added_up(dx), token=None, position=None), dp, gradients  # type: ignore[arg-type]
