"""Every token through the experts it chose: dropless, exact, one interface, several backends.

`dispatch` sorts token rows by expert, `grouped_matmul` multiplies each group by its own expert's matrix, `combine` adds the rows
of one token up again. `dense_matmul` is the other branch: all tokens through all experts, nothing to sort.

The portable backend is a *loop* over experts: dequantize one expert's matrix, then multiply its group tile by tile. Rows are
sorted, so a tile that runs over the end of its group only writes rows that the next group overwrites: no mask, no copy, no token
dropped for any routing; the price is half a tile of padding per expert. `jax.lax.ragged_dot` is not used: XLA expands it to the
dense product, 8 times the useful FLOPs at 1 of 8 experts.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from models.ops.linear import Weight, dequantized, with_frozen

BACKENDS = ("loop",)


class Plan(NamedTuple):
    """Static choices of one grouped matmul. `tile`, `small_tile`: rows of one product, and of one for what is left of a group;
    `trainable`: the weight wants a gradient too."""

    backend: str
    tile: int
    small_tile: int
    name: str = "experts"
    trainable: bool = False


class Groups(NamedTuple):
    """Where each (token, choice) stands after sorting by expert.

    token: int32 [M], the token of each sorted row (N where the row is padding). position: int32 [N, K], the sorted row of each
    choice. sizes: int32 [E]. M = N·K + tile rows: the slack that the last tile may run into.
    """

    token: jax.Array
    position: jax.Array
    sizes: jax.Array


class LoRAWeights(NamedTuple):
    """One adapter pair per expert; the scale alpha/rank is already in `b`. a: [E, R, I]; b: [E, O, R]."""

    a: jax.Array
    b: jax.Array


def choose(backend: str, platform: str, tokens: int, experts: int, experts_per_token: int) -> Plan:
    """The backend and its tile for this platform and size. Raises ValueError for a backend that does not exist.

    Large tiles of at most half the mean group; small ones for the rest of a group, so that padding stays at a few percent. 128 and
    32 rows measured best on two CPU cores; a GPU wants larger ones (fewer launches).
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"moe_backend = {backend!r}: expected one of {['auto', *BACKENDS]}")
    mean_group = max(1, tokens * experts_per_token // experts)
    largest, smallest = (128, 32) if platform == "cpu" else (512, 64)
    tile = min(largest, max(8, _power_of_two(mean_group // 2)))
    return Plan("loop", tile, min(tile, smallest))


def _power_of_two(n: int) -> int:
    """The largest power of two that is at most n (1 for n < 1)."""
    return 1 << max(n, 1).bit_length() - 1


def group(experts: jax.Array, valid: jax.Array, num_experts: int, slack: int) -> Groups:
    """Sort the choices by expert, stably. experts: int32 [N, K]; valid: bool [N] (padding tokens visit no expert)."""
    n, k = experts.shape
    flat = jnp.where(valid[:, None], experts, num_experts).reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)  # [N·K], sorted row -> choice
    position = jnp.zeros(n * k, jnp.int32).at[order].set(jnp.arange(n * k, dtype=jnp.int32), unique_indices=True)
    sizes = jnp.sum(flat[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    rows = jnp.arange(n * k, dtype=jnp.int32)
    token = jnp.where(rows < sizes.sum(), order // k, n)
    return Groups(jnp.pad(token, (0, slack), constant_values=n), position.reshape(n, k), sizes)


@jax.custom_vjp
def dispatch(x: jax.Array, groups: Groups) -> jax.Array:
    """Copy token rows to their sorted places: [N, D] -> [M, D]; padding rows are zero. Transpose of `combine`."""
    return jnp.take(x, groups.token, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def combine(y: jax.Array, groups: Groups) -> jax.Array:
    """Add up the rows of each token: [M, D] -> [N, D]. A gather, as is its transpose `dispatch`: no scatter-add anywhere."""
    return jnp.take(y, groups.position, axis=0, mode="clip").sum(axis=1)


dispatch.defvjp(lambda x, groups: (dispatch(x, groups), groups), lambda groups, g: (combine(g, groups), None))
combine.defvjp(lambda y, groups: (combine(y, groups), groups), lambda groups, g: (dispatch(g, groups), None))


@jax.custom_vjp
def sort_weights(weights: jax.Array, groups: Groups) -> jax.Array:
    """The routing weight of each sorted row: [N, K] -> [M], zero on padding rows. Its gradient is a gather too."""
    sorted_weights = jnp.zeros(groups.token.shape, weights.dtype)
    sorted_weights = sorted_weights.at[groups.position.reshape(-1)].set(weights.reshape(-1), unique_indices=True)
    return jnp.where(groups.token < weights.shape[0], sorted_weights, 0)


def _sort_weights_backward(groups: Groups, g: jax.Array) -> tuple[jax.Array, None]:
    live = groups.token < groups.position.shape[0]
    return jnp.take(jnp.where(live, g, 0), groups.position, axis=0), None


sort_weights.defvjp(lambda weights, groups: (sort_weights(weights, groups), groups), _sort_weights_backward)


def grouped_matmul(
    x: jax.Array,
    weight: Weight,
    sizes: jax.Array,
    plan: Plan,
    lora: LoRAWeights | None = None,
    lora_x: jax.Array | None = None,
) -> jax.Array:
    """y[m] = x[m] W[e]ᵀ + (lora_x[m] A[e]ᵀ) B[e]ᵀ with e the group of row m.

    x: [M, I] as `dispatch` sorts it; weight: [E, O, I], an array or NF4; sizes: int32 [E]; lora_x: x after dropout (default: x).
    Returns [M, O] in x's dtype. Gradients: x, lora_x, the adapter, and the weight if `plan.trainable`; a frozen weight is saved as
    the codes it is, and dequantized again in the backward pass.
    """
    return _grouped(plan, x, lora_x, weight, lora, sizes)


def _rows(array, row, count):  # type: ignore[no-untyped-def]
    return None if array is None else jax.lax.dynamic_slice_in_dim(array, row, count)


def _put(array, rows, row):  # type: ignore[no-untyped-def]
    return jax.lax.dynamic_update_slice_in_dim(array, rows, row, 0)


def _over_tiles(plan, start, size, body, state):  # type: ignore[no-untyped-def]
    """body(row, first, count, state) for each tile of a group: large tiles while they fit, then small ones for the rest.

    `first`: the tile's number of rows before it in the group. Large tiles read the weight less often, small ones pad less.
    """
    whole = size // plan.tile

    def tiles(count, offset):  # type: ignore[no-untyped-def]
        return lambda i, state: body(start + offset + i * count, offset + i * count, count, state)

    state = jax.lax.fori_loop(0, whole, tiles(plan.tile, 0), state)
    rest = size - whole * plan.tile
    return jax.lax.fori_loop(0, -(-rest // plan.small_tile), tiles(plan.small_tile, whole * plan.tile), state)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(plan, x, lora_x, weight, lora, sizes):  # type: ignore[no-untyped-def]
    def expert(y, xs):  # type: ignore[no-untyped-def]
        weight_e, lora_e, start, size = xs
        w = dequantized(weight_e, x.dtype, f"{plan.name}_dequant")

        def tile(row, _, count, y):  # type: ignore[no-untyped-def]
            rows = _rows(x, row, count)
            part = jnp.einsum("ti,oi->to", rows, w)
            if lora_e is not None:
                with jax.named_scope("lora"):
                    low = jnp.einsum(
                        "ti,ri->tr", rows if lora_x is None else _rows(lora_x, row, count), lora_e.a.astype(x.dtype)
                    )
                    part = part + jnp.einsum("tr,or->to", low, lora_e.b.astype(x.dtype))
            return _put(y, part, row)

        with jax.named_scope(plan.name):
            return _over_tiles(plan, start, size, tile, y), None

    y = jnp.zeros((x.shape[0], weight.shape[-2]), x.dtype)
    return jax.lax.scan(expert, y, (weight, lora, jnp.cumsum(sizes) - sizes, sizes))[0]


def _grouped_forward(plan, x, lora_x, weight, lora, sizes):  # type: ignore[no-untyped-def]
    return _grouped(plan, x, lora_x, weight, lora, sizes), (x, lora_x, weight, lora, sizes)


def _grouped_backward(plan, residuals, dy):  # type: ignore[no-untyped-def]
    """Per expert: dX tile by tile, and the sums dA, dB (and dW) over the group's rows, in fp32.

    With L = lora_x Aᵀ: dL = dY B, dX = dY W (+ dL A), dA = dLᵀ lora_x, dB = dYᵀ L, dW = dYᵀ X. dB is summed up transposed: [R, O] is
    the product that the compilers do well.
    """
    x, lora_x, weight, lora, sizes = residuals

    def expert(dxs, xs):  # type: ignore[no-untyped-def]
        weight_e, lora_e, start, size = xs
        w = dequantized(weight_e, x.dtype, f"{plan.name}_dequant")

        def tile(row, first, count, state):  # type: ignore[no-untyped-def]
            (dx, dlora_x), (dw, da, db) = state
            inside = (first + jnp.arange(count) < size)[:, None]
            dy_rows = jnp.where(inside, _rows(dy, row, count), jnp.zeros((), dy.dtype))
            dx_rows = jnp.einsum("to,oi->ti", dy_rows, w)
            if plan.trainable:
                dw = dw + jnp.einsum("to,ti->oi", dy_rows, _rows(x, row, count), preferred_element_type=jnp.float32)
            if lora_e is not None:
                with jax.named_scope("lora"):
                    rows, a = _rows(x if lora_x is None else lora_x, row, count), lora_e.a.astype(x.dtype)
                    low = jnp.einsum("ti,ri->tr", rows, a)
                    dlow = jnp.einsum("to,or->tr", dy_rows, lora_e.b.astype(x.dtype))
                    da = da + jnp.einsum("tr,ti->ri", dlow, rows, preferred_element_type=jnp.float32)
                    db = db + jnp.einsum("tr,to->ro", low, dy_rows, preferred_element_type=jnp.float32)
                    through = jnp.einsum("tr,ri->ti", dlow, a)
                if lora_x is None:
                    dx_rows = dx_rows + through
                else:
                    dlora_x = _put(dlora_x, through, row)
            return (_put(dx, dx_rows, row), dlora_x), (dw, da, db)

        with jax.named_scope(plan.name):
            dw = jnp.zeros(w.shape, jnp.float32) if plan.trainable else None
            da, db = (None, None) if lora_e is None else (jnp.zeros(lora_e.a.shape), jnp.zeros(lora_e.b.shape[::-1]))
            return _over_tiles(plan, start, size, tile, (dxs, (dw, da, db)))

    zeros = jax.tree.map(jnp.zeros_like, (x, lora_x))
    (dx, dlora_x), (dw, da, db) = jax.lax.scan(expert, zeros, (weight, lora, jnp.cumsum(sizes) - sizes, sizes))
    dw = dw.astype(weight.dtype) if plan.trainable and isinstance(weight, jax.Array) else None
    dlora = None if lora is None else LoRAWeights(da.astype(lora.a.dtype), db.swapaxes(1, 2).astype(lora.b.dtype))
    return dx, dlora_x, dw, dlora, None


_grouped.defvjp(_grouped_forward, _grouped_backward)


def dense_matmul(product: str, x: jax.Array, weight: Weight, name: str, *, trainable: bool) -> jax.Array:
    """All tokens through all experts in one batched matmul. `product` is an einsum of (x, w), e.g. "nd,efd->enf"."""
    if trainable:
        return jnp.einsum(product, x, dequantized(weight, x.dtype, f"{name}_dequant"))
    return with_frozen(_Einsum(product), f"{name}_dequant", weight, x)


class _Einsum(NamedTuple):
    """A hashable einsum of (w, x): static argument of `with_frozen`."""

    product: str

    def __call__(self, w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.einsum(self.product, x, w)
