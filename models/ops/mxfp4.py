"""MXFP4 storage of frozen weights: the codes and scales of gpt-oss's checkpoints, and the values that transformers gives them, to the bit.

OCP Microscaling (MX) 1.0: 32 weights of a row share a scale, a power of two (E8M0: 2^(byte - 127)); each is an e2m1 code. Values are those
of transformers 5.24's `integrations.mxfp4.convert_moe_packed_tensors` (`tests/oracles/mxfp4.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.models.ops.quantized import COLUMNS, KINDS, Kind, QuantizedTensor

BLOCK = KINDS["mxfp4"].block
CODEBOOK = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
"""Of the codes 0 to 7; 8 to 15 are their negatives."""
BIAS, NAN = 127, 255
"""Of scales: the byte that stands for 1, and the one that is no number."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tensor(QuantizedTensor):
    """A weight in MXFP4. scales: the blocks' exponents, uint8 [..., out, in/32], in columns as `quantized.LAYOUTS` has it."""

    scales: jax.Array

    @property
    def kind(self) -> str:
        return "mxfp4"

    def as_laid(self, dtype: Any) -> jax.Array:
        return as_laid(self, dtype)

    @staticmethod
    def scales_at(parts: Mapping[str, Callable[[Any], Any]], tables: tuple[Any, ...], blocks: jax.Array) -> jax.Array:
        return parts["scales"](blocks)  # type: ignore[no-any-return]

    @staticmethod
    def values(code: jax.Array, scales: jax.Array, tables: tuple[Any, ...], dtype: Any) -> jax.Array:
        return _numbers(code, scales, dtype)


def dequantize(weight: Tensor, dtype: Any = jnp.float32) -> jax.Array:
    """[..., out, in] in `dtype`."""
    return weight.turned(as_laid(weight, dtype))


def as_laid(weight: Tensor, dtype: Any = jnp.float32) -> jax.Array:
    """The values themselves, which fp32 and bf16 both hold, in memory's order. Infinite where they end."""
    out, inner = weight.matrix
    index = weight.indices()
    if weight.layout in COLUMNS:
        return _numbers(index, weight.scales.reshape(*index.shape[:-4], inner // BLOCK, 1, 1, out), dtype)
    code = index.reshape(*weight.scales.shape, BLOCK)
    return _numbers(code, weight.scales[..., None], dtype).reshape(weight.shape)


def _numbers(code: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """A number is put together from its bits: by integers, because a CPU's program takes the smallest numbers for zero in any product."""
    made: Any = jnp.dtype(dtype) if jnp.dtype(dtype) == jnp.bfloat16 else jnp.dtype(jnp.float32)
    bits, word = jnp.finfo(made).nmant, jnp.dtype(f"uint{8 * made.itemsize}")
    code, scale = code.astype(word), scale.astype(word)
    size = code & 7  # exponent and the one bit of the mantissa
    normal = ((scale - 1) << bits) + (jnp.where(size == 1, 0, size) << (bits - 1))  # 0.5 is 1 x 2^-1
    infinite = np.array(np.inf, made).view(word)
    # Below the smallest normal number (and for zero) the mantissa is all there is: its last place is 2^-126 or 2^-127 … of 0.5.
    low = jnp.minimum(scale, 2)
    positive = jnp.where((size << low) < 4, size << (low + (bits - 2)), jnp.minimum(normal, infinite))
    return jax.lax.bitcast_convert_type(positive | ((code & 8) << (8 * made.itemsize - 4)), made).astype(dtype)


def is_finite(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Whether all of a block's weights are numbers, and finite in fp32 and bf16: bool, as `scales`. codes: canonical, of as many blocks."""
    found: np.ndarray = scales < 253  # 6 x 2^125 is the largest that both hold
    blocks = codes.reshape(*scales.shape, BLOCK // 2)
    for at in map(tuple, np.argwhere((scales != NAN) & ~found)):
        largest = CODEBOOK[np.maximum(blocks[at] & 7, (blocks[at] >> 4) & 7).max()]
        found[at] = float(largest) * 2.0 ** (int(scales[at]) - BIAS) < 2.0**128
    return found


def encode(weight: jax.Array | np.ndarray, kind: Kind) -> dict[str, Any]:
    """A matrix [out, in] in canonical parts: a block's scale makes its largest weight 4 to 8, every weight is rounded to the nearest code,
    of two the even one, those above 6 to 6 (MX 1.0, section 6.3). Raises ValueError where it holds NaN or infinity, and for rows that are
    no whole blocks."""
    shapes = kind.parts(tuple(weight.shape), canonical=True)
    blocks = np.asarray(weight, np.float32).reshape(-1, BLOCK)
    largest = np.abs(blocks).max(axis=1)
    if not np.isfinite(largest).all():
        raise ValueError("a weight that is NaN or infinite cannot be quantized")
    exponent = np.maximum(np.frexp(largest)[1] - 3, -BIAS)
    code = np.ldexp(blocks, -exponent[:, None]).astype(jnp.float4_e2m1fn).view(np.uint8).reshape(-1)
    return {"codes": (code[0::2] | code[1::2] << 4).reshape(shapes["codes"][0]), "scales": (exponent + BIAS).astype(np.uint8)}
