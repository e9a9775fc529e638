"""Backend `decode`: one launch a product for all experts, by kernels for GPUs that decode 4-bit codes themselves (`kernels`).

For small batches and while decoding, when a step is the traffic of the weights: codes are read once for all rows of an expert, where they
are stored in the stack of layers, and no dequantized matrix is ever in memory. Of more than `choice.DECODED_ROWS` rows an expert a layer's
matrices are dequantized first, as `capacity` has them. No row is padded and none is dropped, for any routing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax.models.ops import choice
from moejax.models.ops.grouped import kernels, ragged
from moejax.models.ops.grouped.expert import Gradients, Plan, Projection, matrices
from moejax.models.ops.linear import OfLayer, Weight, in_host, is_spread, part
from moejax.models.ops.quantized import QuantizedTensor

CAPABILITY = 8.0
"""CUDA's compute capability from which on jax lowers Pallas kernels."""


def refusal(platform: str, capability: float | None) -> str | None:
    """Why the kernels cannot run on a platform (as `choice.here` says it); None where they can. capability: CUDA's number of the card;
    None: unknown, taken for enough."""
    if platform == "cpu" or choice.is_tpu(platform):
        return f"for GPUs, and this is a {'CPU' if platform == 'cpu' else platform}"
    if capability is not None and capability < CAPABILITY:
        return f"for compute capability {CAPABILITY} and newer, and {platform} has {capability}"
    return None


def stack(weight: Weight, dtype: Any) -> kernels.Stack:
    """A weight [E, O, I] as the kernels take it: where it is one layer's of a stack on this device, that stack and the layer's number, so
    that nothing is copied."""
    if isinstance(weight, OfLayer) and not (in_host(weight) or is_spread(weight) or _unreachable(weight.stacked)):
        stored, layer = weight.stacked, weight.layer.reshape(1).astype(jnp.int32)
    else:
        spread, stored = is_spread(weight), part(weight)
        stored = jax.tree.map(lambda a: a[None], stored.gathered() if spread else stored)  # type: ignore[union-attr]
        layer = jnp.zeros(1, jnp.int32)
    shape: Any = tuple(stored.shape[1:])
    if isinstance(stored, QuantizedTensor) and stored.layout == "halves":
        parts = {name: a if name == "codes" else a.reshape(*a.shape[:2], -1) for name, a in stored.parts().items()}
        return kernels.Stack(stored.kind, shape, tuple(parts.items()), layer)
    array = stored.dequantize(dtype) if isinstance(stored, QuantizedTensor) else stored.astype(dtype)  # type: ignore[union-attr]
    return kernels.Stack("", shape, (("", array),), layer)


def _unreachable(stored: Any) -> bool:
    """Of bytes from number 2^31 on jax's kernels address the wrong ones: they count in 32 bits up to a size of 2^32."""
    return any(2**31 < a.size <= 2**32 for a in jax.tree.leaves(stored) if a.dtype.itemsize == 1)


class Products(NamedTuple):
    """The functions of `dot`, of rows [M, …] sorted by expert; a matrix is a `kernels.Stack`, or an adapter's [E, …]. Rows of no expert are
    not written."""

    tiles: kernels.Tiles

    def forward(self, rows: jax.Array, w: kernels.Stack | jax.Array) -> jax.Array:
        """[M, I] -> [M, O]."""
        return kernels.product(rows, w if isinstance(w, kernels.Stack) else stack(w, rows.dtype), self.tiles)

    def backward(self, dy: jax.Array, w: kernels.Stack | jax.Array) -> jax.Array:
        """[M, O] -> [M, I]."""
        return kernels.product(dy, w if isinstance(w, kernels.Stack) else stack(w, dy.dtype), self.tiles, transposed=True)

    def gradient(self, dy: jax.Array, rows: jax.Array) -> jax.Array:
        """[M, O], [M, I] -> fp32 [E, O, I]."""
        return kernels.gradient(dy, rows, self.tiles)

    def with_bias(self, dy: jax.Array, bias: jax.Array) -> jax.Array:
        """bias: of each row's expert, [M, O]."""
        return jnp.sum(dy * bias, axis=-1)

    def bias_gradient(self, dy: jax.Array, by: jax.Array) -> jax.Array:
        """fp32 [E, O]."""
        return self.gradient(by[:, None], dy)[:, 0]


def _made(plan: Plan, weights: Sequence[Weight], sizes: jax.Array, rows: int, dtype: Any) -> tuple[Any, Sequence[Any]]:
    many = rows > choice.DECODED_ROWS * sizes.shape[0]
    tiles = kernels.Tiles.of(sizes, rows, dtype, kernels.LARGE if many else kernels.MOST_ROWS)
    if many:
        weights = matrices(plan, weights, dtype)
    return Products(tiles), [stack(w, dtype) for w in weights]


def forward(
    plan: Plan, keep: bool, x: jax.Array, p: jax.Array, sizes: jax.Array, inputs: Sequence[Projection], output: Projection, keys: Any
) -> tuple[jax.Array, list[jax.Array]]:
    """The output rows [M, O], and the hidden rows [M, F] if `keep`."""
    return ragged.forward(plan, keep, x, p, sizes, inputs, output, keys, _made)


def backward(plan: Plan, operands: Any, kept: list[jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array, Gradients]:
    """dx, dp, and the gradients of weights and adapters, [E, …] in fp32."""
    return ragged.backward(plan, operands, kept, dy, _made)
