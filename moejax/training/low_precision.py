"""Weights in bf16: rounded stochastically (arXiv 1502.02551), what is added to one arrives on average, however small it is next to it.

Rounded to the nearest, the loss would hardly move where the learning rate is too small, and nothing else would show it: that is said.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.config import Experiment
from moejax.models.build import Model
from moejax.models.layers import INIT_STD
from moejax.training.optimizer import is_decayed

Tree = Any

_SIGN, _INFINITY, _QUIET = (np.uint32(word) for word in (0x80000000, 0x7F800000, 0x00400000))
SAMPLE = 2**20
"""Weights that are looked at, evenly over all matrices."""
NORMAL_MEDIAN = 0.6745
"""Of the magnitudes of normal numbers, in standard deviations."""
SHARE = 0.25
"""Of the learning rate: the root mean square of Adam's steps where gradients are noise, sqrt((1 - β1) / (1 + β1)) at β1 = 0.9."""


def stochastic(x: jax.Array, bits: jax.Array) -> jax.Array:
    """x, fp32, as one of the two bf16 numbers around it. bits: uint16 of x's shape, evenly distributed.

    Of the 65,536 values of `bits` exactly this many round away from zero as x lies 65,536ths of the way: the mean is x itself, for
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


def half_step(weight: float) -> float:
    """Half the distance from a bf16 number of this magnitude to the next: what is smaller is rounded away when it is added."""
    return 2.0 ** (math.floor(math.log2(weight)) - 8) if weight > 0 else 0.0


def median_weight(trainable: Any) -> float:
    """Median magnitude of the matrices' weights, of a sample."""
    flat = jax.tree_util.tree_leaves_with_path(trainable)
    matrices = [leaf for path, leaf in flat if is_decayed(path)]
    every = max(1, sum(leaf.size for leaf in matrices) // SAMPLE)
    sample = jax.jit(lambda leaf: jnp.abs(leaf.reshape(-1)[::every].astype(jnp.float32)))
    return float(np.median(np.concatenate([np.asarray(sample(leaf)) for leaf in matrices])))


def warnings(experiment: Experiment, model: Model | None = None) -> list[str]:
    """A line where most of a step's changes would be lost in rounding. model: with its weights; None where none are loaded."""
    t = experiment.training
    if experiment.adapter is not None or t.param_dtype != "bfloat16":
        return []
    median = NORMAL_MEDIAN * INIT_STD if model is None else median_weight(nnx.state(model, nnx.Param))
    needed = half_step(median)
    if SHARE * t.learning_rate >= needed:
        return []
    of = f"the median weight, {median:.2g}" + (" (a new model's: no weights are read here)" if model is None else "")
    return [
        f"warning: training.learning_rate = {t.learning_rate:g} is too small for weights in bf16: a step changes a weight by at most about "
        f"{t.learning_rate:.2g}, mostly by {SHARE * t.learning_rate:.2g}, and {of}, changes only by more than {needed:.2g}, "
        "half of its bf16 step. The rest is rounded away, and the loss hardly moves (update_norm is what is left). "
        "training.param_dtype=bfloat16_stochastic keeps it on average, in the same memory; training.param_dtype=float32 keeps it "
        "exactly, in twice the memory"
    ]  # fmt: skip
