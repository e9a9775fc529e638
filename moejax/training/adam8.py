"""AdamW with moments in 8 bits, block by block (arXiv 2110.02861), as bitsandbytes 0.50.2's AdamW8bit is on a GPU.

Read off `kOptimizerStatic8bit2StateBlockwise` and `quantize_2D` of its csrc/kernels.cu:

- 256 numbers in a row of a parameter are a block (the last may be shorter): codes, and the largest magnitude in fp32. First moments by the
  signed dynamic map, second ones by the unsigned.
- A number over its block's largest becomes the nearest code; halfway between two, the even one. A negative first moment never becomes
  zero: it takes the smallest negative code. (On a CPU bitsandbytes looks up a table of 65,536 even steps from -1 to 1 instead, which knows
  nothing smaller than 1.5e-5: 9 % of the codes differ. That rule is not taken, on no platform.)
- The weight is changed by the moments before they are rounded: w = (w - rate · sqrt(1 - b2^t) / (1 - b1^t) · m / (sqrt(v) + eps ·
  sqrt(1 - b2^t))) · (1 - rate · decay).
- A parameter of fewer than 4,096 numbers has its moments in fp32.

A parameter is what is one in PyTorch: of a stack [L, …] or [L, E, …] each matrix has its own blocks. Unlike the kernel this does not pass
over gradients that are not finite: a run stops at them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from moejax.estimator.sizes import BLOCK_8BIT, in_8_bits, pieces
from moejax.models.ops.nf4 import dynamic_map

_ZERO = 127  # the signed map's code of 0


class Moments(NamedTuple):
    """Of one kind. codes: uint8, of the weight's shape; largest: fp32 [(layers, (experts,)) blocks], 1 where all of a block are zero."""

    codes: jax.Array
    largest: jax.Array


class Adam8State(NamedTuple):
    """steps: int32, how many are done; moments: trees of the weights' form, `Moments` in the places of arrays, and of small parameters fp32
    arrays of the weight's shape. So whoever knows where a weight lies knows where its moments do."""

    steps: jax.Array
    first: Any
    second: Any


_map = cache(dynamic_map)


@cache
def _thresholds(signed: bool) -> np.ndarray:
    """fp32 [256]: the k-th code begins above the k-th. Of two codes at the same distance the even one is taken, so that the middle itself
    is above the threshold of an even code."""
    numbers = _map(signed)
    middles = (numbers[1:] + numbers[:-1]) * np.float32(0.5)
    middles = np.where(np.arange(255) % 2, np.nextafter(middles, np.float32(-2)), middles)
    return np.concatenate([[-np.inf], middles]).astype(np.float32)


def nearest(x: jax.Array, signed: bool) -> jax.Array:
    """int32 codes of numbers between -1 and 1.

    A decade is a line of evenly spaced codes, the next one a fifth as steep: the lowest of the seven lines tells which threshold is near,
    to a quarter of the way to the next, and the threshold decides. (A search by halves is eight look-ups, one of another: XLA would
    neither fuse nor soon compile them.)
    """
    lines = []
    for decade in range(7):
        count = 2 ** (decade + (not signed))  # of codes in it, from a tenth of its end to its end; before it are count - 1, or - 2
        lines.append(jnp.abs(x) * np.float32(count * 10.0 ** (6 - decade) / 0.9) + np.float32(count - (1 if signed else 2) - count / 9))
    place = jnp.clip(jnp.round(reduce(jnp.minimum, lines)).astype(jnp.int32), 0, _ZERO if signed else 254)
    above = jnp.where(x < 0, _ZERO - place, _ZERO + 1 + place) if signed else 1 + place
    begins = jnp.asarray(_thresholds(signed)).at[above].get(mode="promise_in_bounds")
    code = jnp.where(x > begins, above, above - 1)
    return jnp.where((code == _ZERO) & jnp.signbit(x), _ZERO - 1, code) if signed else code


def _blocks(x: jax.Array) -> jax.Array:
    """[…, numbers] -> […, blocks, 256], zeros behind each parameter's."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % BLOCK_8BIT)]).reshape(*x.shape[:-1], -1, BLOCK_8BIT)


def quantized(x: jax.Array, signed: bool) -> Moments:
    """x: fp32 […, numbers], the last axis of one parameter."""
    blocks = _blocks(x)
    largest = jnp.max(jnp.abs(blocks), axis=-1)
    largest = jnp.where(largest > 0, largest, 1)
    codes = nearest(blocks / largest[..., None], signed)
    return Moments(codes.astype(jnp.uint8).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]], largest)


def dequantized(moments: Moments, signed: bool) -> jax.Array:
    """fp32 […, numbers], of codes so."""
    codes, largest = moments
    numbers = _blocks(jnp.asarray(_map(signed)).at[codes.astype(jnp.int32)].get(mode="promise_in_bounds"))
    return (numbers * largest[..., None]).reshape(*codes.shape[:-1], -1)[..., : codes.shape[-1]]


def stacked_in(weight: Any) -> int:
    """Over how many leading axes of a weight PyTorch's parameters are stacked: its layers, and of experts' matrices those of each. weight:
    the variable, or an array, which is one."""
    axes = weight.get_metadata("axes", ()) if isinstance(weight, nnx.Variable) else ()
    return 0 if axes[:1] != ("layers",) else 2 if axes[:2] == ("layers", "experts") and len(axes) == 4 else 1


def adamw_8bit(
    schedule: optax.Schedule, b1: float, b2: float, eps: float, weight_decay: float, decayed: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """The whole rule: its updates are what is added to the weights. decayed: weights -> a tree of bool."""

    def init(weights: Any) -> Adam8State:
        def zeros(weight: Any) -> Any:
            array, lead = _array(weight), _array(weight).shape[: stacked_in(weight)]
            parameters = math.prod(lead)
            if not in_8_bits(array.size, parameters):
                return _in_place_of(weight, jnp.zeros(array.shape, jnp.float32))
            blocks = -(-array.size // parameters // BLOCK_8BIT)
            return _in_place_of(weight, Moments(jnp.zeros(array.shape, jnp.uint8), jnp.zeros((*lead, blocks), jnp.float32)))

        first, second = (jax.tree.map(zeros, weights, is_leaf=_is_one) for _ in range(2))
        return Adam8State(jnp.zeros((), jnp.int32), first, second)

    def update(gradients: Any, state: optax.OptState, weights: Any = None) -> tuple[Any, Adam8State]:
        assert isinstance(state, Adam8State) and weights is not None
        steps = optax.safe_increment(state.steps)
        rate = jnp.asarray(schedule(state.steps), jnp.float32)
        corrections = 1 - jnp.float32(b1) ** steps, jnp.sqrt(1 - jnp.float32(b2) ** steps)

        def changed(w: jax.Array, g: jax.Array, m: jax.Array, v: jax.Array, decay: jax.Array | float) -> tuple[jax.Array, ...]:
            """What is added to the weights, and the moments: all fp32."""
            m, v = m * b1 + (1 - jnp.float32(b1)) * g, v * b2 + (1 - jnp.float32(b2)) * g * g
            change = (-rate * corrections[1] / corrections[0]) * (m / (jnp.sqrt(v) + eps * corrections[1]))
            # The difference is exact where a weight hardly changes: what adds it to the weight rounds as if this had stored the weight.
            return (w + change) * (1 - decay) - w, m, v

        trees = weights, gradients, decayed(weights), state.first, state.second
        found = []
        for variable, *others in zip(*(jax.tree.leaves(tree, is_leaf=_is_one) for tree in trees), strict=True):
            w, g, is_decayed, m, v = map(_array, (variable, *others))
            decay = rate * weight_decay if is_decayed else 0.0
            if isinstance(m, Moments):
                new = _in_pieces(partial(_in_8_bits, partial(changed, decay=decay)), stacked_in(variable), w, g, m, v)
            else:
                new = changed(w.astype(jnp.float32), g.astype(jnp.float32), m, v, decay)
            found.append([_in_place_of(variable, value) for value in new])
        form = jax.tree.structure(weights, is_leaf=_is_one)
        updates, first, second = (jax.tree.unflatten(form, values) for values in zip(*found, strict=True))
        return updates, Adam8State(steps, first, second)

    return optax.GradientTransformation(init, update)


def _in_8_bits(changed: Callable[..., Any], w: jax.Array, g: jax.Array, m: Moments, v: Moments) -> tuple[jax.Array, Moments, Moments]:
    """[…, numbers] each."""
    u, wide_m, wide_v = changed(w.astype(jnp.float32), g.astype(jnp.float32), dequantized(m, True), dequantized(v, False))
    return u.astype(g.dtype), quantized(wide_m, True), quantized(wide_v, False)


def _in_pieces(changed: Callable[..., Any], stacked: int, w: jax.Array, g: jax.Array, m: Moments, v: Moments) -> Any:
    """`changed` of a weight, some layers or parts of matrices after others where it is large, in the gradient's and the moments' own
    places: XLA holds both moments of what is changed at once in fp32. The experts' axis is not cut: it may lie on several devices."""
    groups, parts = pieces(w.shape, stacked)
    lead = w.shape[:stacked] or (1,)

    def cut(x: jax.Array) -> jax.Array:
        return x.reshape(groups, lead[0] // groups, *lead[1:], parts, -1)

    def at(index: Any, x: jax.Array) -> tuple[Any, ...]:
        return (index // parts, *(0,) * (x.ndim - 3), index % parts, 0)

    def piece(index: Any, carry: Any) -> Any:
        def of(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(x, at(index, x), (1, *x.shape[1:-2], 1, x.shape[-1]))

        return jax.tree.map(
            lambda x, part: jax.lax.dynamic_update_slice(x, part, at(index, x)), carry, changed(of(cut(w)), *jax.tree.map(of, carry))
        )

    carry = jax.tree.map(cut, (g, m, v))
    carry = piece(0, carry) if groups * parts == 1 else jax.lax.fori_loop(0, groups * parts, piece, carry)
    return jax.tree.map(lambda x, like: x.reshape(like.shape), carry, (g, m, v))


def _is_one(node: Any) -> bool:
    """Whether it stands for one weight."""
    return isinstance(node, nnx.Variable | Moments)


def _array(weight: Any) -> Any:
    return weight.get_value() if isinstance(weight, nnx.Variable) else weight


def _in_place_of(weight: Any, value: Any) -> Any:
    return weight.replace(value) if isinstance(weight, nnx.Variable) else value
