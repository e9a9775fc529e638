"""Stochastic rounding to bf16 (arXiv 1502.02551): what is added to a weight arrives on average, however small it is beside the weight."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any

_SIGN, _INFINITY, _QUIET = (np.uint32(word) for word in (0x80000000, 0x7F800000, 0x00400000))


def stochastic(x: jax.Array, bits: jax.Array) -> jax.Array:
    """x, fp32, as one of the two bf16 numbers around it. bits: uint16 of x's shape, evenly distributed.

    Of the 65,536 values of `bits` exactly so many round away from zero as x lies 65,536ths of the way: the mean is x itself, for
    subnormal numbers too. Infinities and NaN stay what they are, and nothing finite becomes infinite. All in integers: no device
    flushes or contracts them.
    """
    word = jax.lax.bitcast_convert_type(x, jnp.uint32)
    magnitude = word & ~_SIGN
    rounded = jnp.minimum(magnitude + bits.astype(jnp.uint32), _INFINITY - np.uint32(1))
    special = jnp.where(magnitude > _INFINITY, magnitude | _QUIET, magnitude)  # a NaN may differ from infinity below bf16's bits alone
    word = (word & _SIGN) | jnp.where(magnitude < _INFINITY, rounded, special)
    return jax.lax.bitcast_convert_type((word >> 16).astype(jnp.uint16), jnp.bfloat16)


def widened(tree: Tree) -> Tree:
    """Its bf16 leaves in fp32; the others as they are."""
    return jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, tree)


def stored_like(wide: Tree, like: Tree, key: jax.Array) -> Tree:
    """Where `like` has a bf16 leaf, that of `wide` rounded stochastically, each leaf with bits of its own; the others as they are."""
    leaves, treedef = jax.tree.flatten(wide)
    words = jax.random.bits(key, (len(leaves), 2), jnp.uint32)
    for index, (leaf, stored) in enumerate(zip(leaves, jax.tree.leaves(like), strict=True)):
        if stored.dtype == jnp.bfloat16:
            leaves[index] = stochastic(leaf, _bits(words[index], leaf.shape))
    return jax.tree.unflatten(treedef, leaves)


def _bits(words: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint16 of this shape: a hash of each element's number and of `words`, uint32 [2].

    jax's own generator would be most of the optimizer's time and of what there is to compile, for bits that choose a rounding.
    """
    number = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        number = number * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return (_mixed(_mixed(number ^ words[0]) ^ words[1]) >> 16).astype(jnp.uint16)


def _mixed(x: jax.Array) -> jax.Array:
    """A permutation of the 32-bit numbers in which every bit depends on every other (shifts and factors found by the public search
    "hash-prospector")."""
    x = (x ^ (x >> 16)) * np.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * np.uint32(0xD35A2D97)
    return x ^ (x >> 15)
