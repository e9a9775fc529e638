"""A product with a weight that may be frozen in 4 bits: what the backward pass keeps is the codes, never a dequantized copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax.models.ops import host
from moejax.models.ops.quantized import QuantizedTensor
from moejax.models.ops.spread import RowsOf


class OfLayer(NamedTuple):
    """One layer of a weight whose first axis is layers, to be sliced where it is used: a loop inside a layer would otherwise first
    copy the whole layer out of the stack."""

    stacked: Stored
    layer: jax.Array


Stored = jax.Array | QuantizedTensor | RowsOf
Weight = Stored | OfLayer


def part(weight: Weight, index: jax.Array | None = None) -> Stored:
    """The weight itself, or entry `index` of its first axis (of the first after layers); fetched, where it lies in the host's memory."""
    if isinstance(weight, OfLayer):
        where = weight.layer if index is None else (weight.layer, index)
        return jax.tree.map(lambda a: host.entry(a, where), weight.stacked)
    return jax.tree.map(host.fetched if index is None else lambda a: host.entry(a, index), weight)


def in_host(weight: Weight) -> bool:
    return any(host.is_host(a) for a in jax.tree.leaves(weight))


def out_size(weight: Weight) -> int:
    """Rows of the last two axes [out, in]."""
    return (weight.stacked if isinstance(weight, OfLayer) else weight).shape[-2]


def count(weight: Weight) -> int:
    """Experts of one layer's stack, those that this device has."""
    return weight.stacked.shape[1] if isinstance(weight, OfLayer) else weight.shape[0]


def in_4_bits(weight: Weight) -> bool:
    return isinstance(weight.stacked if isinstance(weight, OfLayer) else weight, QuantizedTensor)


def is_spread(weight: Weight) -> bool:
    """Whether this device has a part of its rows, and all devices together have to gather them wherever it is used."""
    stored = weight.stacked if isinstance(weight, OfLayer) else weight
    return isinstance(stored, RowsOf) or (isinstance(stored, QuantizedTensor) and not stored.is_whole)


def dequantized(weight: Weight, dtype: jnp.dtype, scope: str) -> jax.Array:
    """The weight as an array of `dtype`, gathered where it is spread; what 4 bits take for it stands under `scope` in a profile."""
    spread, weight = is_spread(weight), part(weight)
    if spread:
        with jax.named_scope("weights_gather"):
            weight = weight.gathered()  # type: ignore[union-attr]
    if isinstance(weight, QuantizedTensor):
        with jax.named_scope(scope):
            # The barrier keeps this from melting into the product that follows: one dequantization per matrix, with its own scope.
            return weight.turned(jax.lax.optimization_barrier(weight.as_laid(dtype)))
    return weight.astype(dtype)  # type: ignore[union-attr]


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Like:
    """Shape and dtype of what the backward pass does not need the values of: part of the tree, since every residual has to be an array."""

    shape: tuple[int, ...]
    dtype: Any


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def with_frozen(product: Callable[..., jax.Array], scope: str, weight: Weight, x: jax.Array) -> jax.Array:
    """product(w, x) with w = the dequantized weight in x's dtype. Differentiable in x; saves only the codes.

    `product` must be linear in x.
    """
    return product(dequantized(weight, x.dtype, scope), x)


def _forward(product, scope, weight, x):  # type: ignore[no-untyped-def]
    return with_frozen(product, scope, weight, x), (weight, _Like(x.shape, x.dtype))


def _backward(product, scope, residuals, dy):  # type: ignore[no-untyped-def]
    weight, like = residuals
    x = jax.ShapeDtypeStruct(like.shape, like.dtype)
    (dx,) = jax.linear_transpose(partial(product, dequantized(weight, x.dtype, scope)), x)(dy)
    return None, dx


with_frozen.defvjp(_forward, _backward)


def matmul(w: jax.Array, x: jax.Array) -> jax.Array:
    """x: [..., I], w: [O, I] (torch's layout) -> [..., O]."""
    return jnp.einsum("...i,oi->...o", x, w)
