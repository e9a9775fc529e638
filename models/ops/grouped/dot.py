"""Some rows times one expert's matrix, and back: all that a backend multiplies a frozen or trained matrix by.

The seam for a kernel: what `operand` gives is opaque to the backends, so one that multiplies by codes gives the codes here.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from moejax.models.ops.linear import Weight, dequantized, part


def operand(weight: Weight, e: jax.Array | None, dtype: Any, scope: str) -> jax.Array:
    """Expert e's matrix [O, I] (None: all experts', [E, O, I]) in `dtype`; the dequantization under its scope."""
    return dequantized(part(weight, e), dtype, scope)


def forward(rows: jax.Array, w: jax.Array) -> jax.Array:
    """y = x Wᵀ: [t, I] -> [t, O]."""
    return jnp.einsum("ti,oi->to", rows, w)


def backward(dy: jax.Array, w: jax.Array) -> jax.Array:
    """dx = dy W: [t, O] -> [t, I]."""
    return jnp.einsum("to,oi->ti", dy, w)


def gradient(dy: jax.Array, rows: jax.Array) -> jax.Array:
    """dW = dyᵀ x, fp32 [O, I]."""
    return jnp.einsum("to,ti->oi", dy, rows, preferred_element_type=jnp.float32)


def with_bias(dy: jax.Array, bias: jax.Array) -> jax.Array:
    """dp = dy · bias: [t, O], [O] -> [t]."""
    return jnp.einsum("to,o->t", dy, bias)


def bias_gradient(dy: jax.Array, by: jax.Array) -> jax.Array:
    """Σ by_t dy_t, fp32 [O]."""
    return jnp.einsum("to,t->o", dy, by, preferred_element_type=jnp.float32)
