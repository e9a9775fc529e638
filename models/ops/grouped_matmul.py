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
    """Static choices of one grouped matmul. `tile`: rows of one product; `trainable`: the weight wants a gradient too."""

    backend: str
    tile: int
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

    Tiles are a quarter of the mean group, so that padding stays near an eighth at worst; 128 rows keep two CPU cores busy, a GPU
    wants larger ones (fewer launches).
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"moe_backend = {backend!r}: expected one of {['auto', *BACKENDS]}")
    mean_group = max(1, tokens * experts_per_token // experts)
    largest = 128 if platform == "cpu" else 512
    tile = min(largest, max(8, 1 << (mean_group // 4).bit_length() - 1 if mean_group >= 4 else 0))
    return Plan("loop", tile)


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


def _tile_product(w: jax.Array, x: jax.Array, lora_x: jax.Array | None, lora: LoRAWeights | None) -> jax.Array:
    """One tile [tile, I] times one expert's matrix [O, I]."""
    y = jnp.einsum("ti,oi->to", x, w)
    if lora is None:
        return y
    with jax.named_scope("lora"):
        low = jnp.einsum("ti,ri->tr", x if lora_x is None else lora_x, lora.a.astype(x.dtype))
        return y + jnp.einsum("tr,or->to", low, lora.b.astype(x.dtype))


def _rows(array, row, count):  # type: ignore[no-untyped-def]
    return None if array is None else jax.lax.dynamic_slice_in_dim(array, row, count)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(plan, x, lora_x, weight, lora, sizes):  # type: ignore[no-untyped-def]
    out_features = weight.shape[-2]

    def expert(y, xs):  # type: ignore[no-untyped-def]
        weight_e, lora_e, start, size = xs
        w = dequantized(weight_e, x.dtype, f"{plan.name}_dequant")

        def tile(i, y):  # type: ignore[no-untyped-def]
            row = start + i * plan.tile
            part = _tile_product(w, _rows(x, row, plan.tile), _rows(lora_x, row, plan.tile), lora_e)
            return jax.lax.dynamic_update_slice_in_dim(y, part, row, 0)

        with jax.named_scope(plan.name):
            return jax.lax.fori_loop(0, -(-size // plan.tile), tile, y), None

    y = jnp.zeros((x.shape[0], out_features), x.dtype)
    return jax.lax.scan(expert, y, (weight, lora, jnp.cumsum(sizes) - sizes, sizes))[0]


def _grouped_forward(plan, x, lora_x, weight, lora, sizes):  # type: ignore[no-untyped-def]
    return _grouped(plan, x, lora_x, weight, lora, sizes), (x, lora_x, weight, lora, sizes)


def _grouped_backward(plan, residuals, dy):  # type: ignore[no-untyped-def]
    """Per expert: dX tile by tile, and the sums dA, dB (and dW) over the group's rows, in fp32."""
    x, lora_x, weight, lora, sizes = residuals

    def expert(dxs, xs):  # type: ignore[no-untyped-def]
        weight_e, lora_e, start, size = xs
        w = dequantized(weight_e, x.dtype, f"{plan.name}_dequant")

        def tile(i, state):  # type: ignore[no-untyped-def]
            dxs, sums = state
            row = start + i * plan.tile
            inside = (i * plan.tile + jnp.arange(plan.tile) < size)[:, None]
            dy_tile = jnp.where(inside, _rows(dy, row, plan.tile), jnp.zeros((), dy.dtype))
            tiles = (_rows(x, row, plan.tile), _rows(lora_x, row, plan.tile))
            # The product is linear in each argument: the forward value that vjp computes is dropped by the compiler.
            if plan.trainable:
                dw, *dtiles, dlora = jax.vjp(_tile_product, w, *tiles, lora_e)[1](dy_tile)
            else:
                *dtiles, dlora = jax.vjp(partial(_tile_product, w), *tiles, lora_e)[1](dy_tile)
                dw = None
            dxs = jax.tree.map(lambda d, t: jax.lax.dynamic_update_slice_in_dim(d, t, row, 0), dxs, tuple(dtiles))
            sums = jax.tree.map(lambda total, part: total + part.astype(jnp.float32), sums, (dw, dlora))
            return dxs, sums

        with jax.named_scope(plan.name):
            sums = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), (w if plan.trainable else None, lora_e))
            return jax.lax.fori_loop(0, -(-size // plan.tile), tile, (dxs, sums))

    zeros = jax.tree.map(jnp.zeros_like, (x, lora_x))
    (dx, dlora_x), (dw, dlora) = jax.lax.scan(expert, zeros, (weight, lora, jnp.cumsum(sizes) - sizes, sizes))
    dw = dw.astype(weight.dtype) if plan.trainable and isinstance(weight, jax.Array) else None
    return dx, dlora_x, dw, jax.tree.map(lambda g, p: g.astype(p.dtype), dlora, lora), None


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
