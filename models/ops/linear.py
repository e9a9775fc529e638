"""A product with a weight that may be frozen in 4 bits: what the backward pass keeps is the codes, never a dequantized copy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from models.ops.nf4 import NF4Tensor, dequantize

Weight = jax.Array | NF4Tensor


def dequantized(weight: Weight, dtype: jnp.dtype, scope: str) -> jax.Array:
    """The weight as an array of `dtype`; the time that NF4 takes for it stands under `scope` in a profile."""
    if isinstance(weight, NF4Tensor):
        with jax.named_scope(scope):
            # The barrier keeps this from melting into the product that follows: one dequantization per matrix, told apart.
            return jax.lax.optimization_barrier(dequantize(weight, dtype))
    return weight.astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def with_frozen(product: Callable[..., jax.Array], scope: str, weight: Weight, x: jax.Array) -> jax.Array:
    """product(w, x) with w = the dequantized weight in x's dtype. Differentiable in x; saves only the codes.

    `product` must be linear in x.
    """
    return product(dequantized(weight, x.dtype, scope), x)


def _forward(product, scope, weight, x):  # type: ignore[no-untyped-def]
    return with_frozen(product, scope, weight, x), (weight, jax.ShapeDtypeStruct(x.shape, x.dtype))


def _backward(product, scope, residuals, dy):  # type: ignore[no-untyped-def]
    weight, x = residuals
    (dx,) = jax.linear_transpose(partial(product, dequantized(weight, x.dtype, scope)), x)(dy)
    return None, dx


with_frozen.defvjp(_forward, _backward)


def matmul(w: jax.Array, x: jax.Array) -> jax.Array:
    """x: [..., I], w: [O, I] (torch's layout) -> [..., O]."""
    return jnp.einsum("...i,oi->...o", x, w)
