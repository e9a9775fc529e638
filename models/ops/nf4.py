"""NF4 storage of frozen weights, bit-identical to bitsandbytes 0.50 on a CPU (`tests/oracles/nf4.py`).

A weight is flattened row-major, cut into blocks of 64, divided by each block's largest magnitude, and stored as 4-bit indices
into a codebook of 16 normal quantiles (QLoRA, arXiv 2305.14314). Double quantization stores the block scales in 8 bits as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.models.ops import choice
from moejax.models.ops.quantized import COLUMNS, KINDS, Kind, QuantizedTensor

BLOCK, NESTED_BLOCK = KINDS["nf4-double"].block, KINDS["nf4-double"].nested

CODEBOOK = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip


def dynamic_map(signed: bool) -> np.ndarray:
    """The 256 codes of the 8-bit dynamic map, fp32 ascending: seven decades of linearly spaced midpoints, twice as many in each where there
    is no sign, and 0 and 1."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = _linspace(2 ** (decade + (not signed)) + 1)
        means = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (decade - 6))
        values += [*means.tolist(), *(-means).tolist()] if signed else means.tolist()
    return np.sort(np.array(values, np.float32))


def _linspace(count: int) -> np.ndarray:
    """0.1 … 1 in fp32 as torch spaces them: from both ends to the middle, each step a fused multiply-add."""
    start, stop = np.float64(np.float32(0.1)), 1.0
    step = np.float64((np.float32(1) - np.float32(0.1)) / np.float32(count - 1))
    index = np.arange(count)
    rising, falling = start + step * index, stop - step * (count - 1 - index)
    return np.where(index < count // 2, rising, falling).astype(np.float32)


def _nearest_table(codes: np.ndarray) -> np.ndarray:
    """uint8 [65536]: the code nearest to each of 65,536 evenly spaced values in [-1, 1] (ties to the lower code).

    bitsandbytes rounds a value to this grid before it looks for the nearest code, so up to 0.25 % of the scales differ by one
    from the nearest code; a checkpoint made there and one made here agree only if we do the same.
    """
    grid = np.float32(-1) + (np.float32(2) * np.arange(65536, dtype=np.float32)) / np.float32(65535)
    middles = np.float32(0.5) * (codes[:-1] + codes[1:])
    return np.searchsorted(middles, grid, side="left").astype(np.uint8)


DYNAMIC_MAP = dynamic_map(signed=True)
_DYNAMIC_TABLE = _nearest_table(DYNAMIC_MAP)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tensor(QuantizedTensor):
    """A weight in NF4, `offset` and `nested_absmax` where its scales are quantized too.

    absmax: the blocks' scales, [..., out, in/64] where rows are whole blocks, else [..., ceil(n/64)]: fp32, or uint8 indices into
    DYNAMIC_MAP; nested_absmax: fp32 [..., ceil(n/64/256)]; offset: fp32 [...]. In columns as `quantized.LAYOUTS` has it.
    """

    absmax: jax.Array
    nested_absmax: jax.Array | None = None
    offset: jax.Array | None = None

    @property
    def kind(self) -> str:
        return "nf4" if self.offset is None else "nf4-double"

    tables = CODEBOOK, DYNAMIC_MAP

    def as_laid(self, dtype: Any) -> jax.Array:
        return as_laid(self, dtype)

    @staticmethod
    def scales_at(parts: Mapping[str, Callable[[Any], Any]], tables: tuple[Any, ...], blocks: jax.Array) -> jax.Array:
        absmax = parts["absmax"](blocks)
        if "offset" not in parts:
            return absmax  # type: ignore[no-any-return]
        return _scale(tables[1][absmax.astype(jnp.int32)], parts["nested_absmax"](blocks // NESTED_BLOCK), parts["offset"](0))

    @staticmethod
    def values(code: jax.Array, scales: jax.Array, tables: tuple[Any, ...], dtype: Any) -> jax.Array:
        return (tables[0][code] * scales).astype(dtype)  # type: ignore[no-any-return]


def encode(weight: jax.Array | np.ndarray, kind: Kind) -> dict[str, Any]:
    """A matrix (any float dtype, concrete) in canonical parts, bitsandbytes' bytes. Raises ValueError where it holds NaN or infinity."""
    codes, absmax = _quantize_blocks(jnp.asarray(weight))
    scales = np.asarray(absmax)
    if not np.isfinite(scales).all():
        raise ValueError("a weight that is NaN or infinite cannot be quantized")
    if not kind.nested:
        return {"codes": codes, "absmax": absmax}
    offset = _torch_mean(scales)
    eight, nested_absmax = _quantize_dynamic(scales - offset)
    return {"codes": codes, "absmax": eight, "nested_absmax": nested_absmax, "offset": offset}


@jax.jit
def _quantize_blocks(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes uint8 [ceil(n/2)] and block scales fp32 [ceil(n/64)]."""
    n = weight.size
    if n % (BLOCK * _PIECE) == 0 and n > BLOCK * _PIECE:
        # A piece after the other: the fp32 form of a large matrix is four times what it comes in, and new memory costs more than the codes.
        codes, absmax = jax.lax.map(_quantize_whole_blocks, weight.reshape(-1, _PIECE, BLOCK))
        return codes.reshape(-1), absmax.reshape(-1)
    blocks = jnp.pad(weight.reshape(-1).astype(jnp.float32), (0, -n % BLOCK)).reshape(-1, BLOCK)
    if n % BLOCK == 0:
        return _quantize_whole_blocks(blocks)
    absmax, divisor, scaled = _scaled(blocks)
    scaled = scaled.at[-1].set(blocks[-1] / divisor[-1])  # the reference divides in the last, partial block: elsewhere a reciprocal
    index = _index(scaled).reshape(-1)[: n + n % 2]
    if n % 2:
        index = index.at[-1].set(7)  # the padding weight is zero
    return (index[0::2] << 4) | index[1::2], absmax


_PIECE = 16384  # blocks


def _quantize_whole_blocks(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[blocks, 64] -> codes uint8 [32 · blocks], scales fp32 [blocks]."""
    absmax, _, scaled = _scaled(blocks.astype(jnp.float32))
    index = _index(scaled).reshape(-1)
    return (index[0::2] << 4) | index[1::2], absmax


def _scaled(blocks: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scales of fp32 blocks, what they are divided by, and the quotients."""
    # As integers, which have the order of the floats that they are: XLA's vectorized maximum of floats loses a NaN on some CPUs.
    magnitudes = jax.lax.bitcast_convert_type(blocks, jnp.int32) & 0x7FFFFFFF
    absmax = jax.lax.bitcast_convert_type(jnp.max(magnitudes, axis=1), jnp.float32)
    divisor = jnp.where(absmax == 0, 1.0, absmax)
    return absmax, divisor, blocks * (1.0 / divisor)[:, None]


def _index(scaled: jax.Array) -> jax.Array:
    middles = (CODEBOOK[:-1] + CODEBOOK[1:]) / np.float32(2)
    return jnp.sum(jnp.clip(scaled, -1, 1)[..., None] > middles, axis=-1, dtype=jnp.uint8)


def _quantize_dynamic(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """8-bit dynamic quantization of fp32 [n] in blocks of 256: indices uint8 [n], scales fp32 [ceil(n/256)].

    On the host: every rounding of the reference is one here, which a compiler that contracts products and sums would not keep.
    """
    n = values.size
    blocks = np.pad(values, (0, -n % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    absmax = np.abs(blocks).max(axis=1)
    reciprocal = np.float32(1) / np.where(absmax == 0, np.float32(1), absmax)
    normal = np.clip(blocks * reciprocal[:, None], np.float32(-1), np.float32(1))
    position = (normal + np.float32(1)) * np.float32(0.5) * np.float32(65535) + np.float32(0.5)
    index = np.where(absmax[:, None] == 0, np.uint8(0), _DYNAMIC_TABLE[position.astype(np.int32)])
    return index.reshape(-1)[:n], absmax


def _look_up(table: np.ndarray, index: jax.Array) -> jax.Array:
    """table[index] without a check: an unsigned index of 4 or 8 bits cannot leave its table."""
    return jnp.asarray(table).at[index].get(mode="promise_in_bounds")


def block_scales(weight: Tensor) -> jax.Array:
    """fp32 scales in the shape of `absmax`, of columns [..., in/64, out], with the second quantization undone."""
    if weight.layout in COLUMNS:
        return _scales_of_columns(weight)
    if weight.nested_absmax is None or weight.offset is None:
        return weight.absmax
    offset = weight.offset[(..., *(None,) * (weight.absmax.ndim - weight.offset.ndim))]
    blocks = math.prod(weight.absmax.shape[weight.offset.ndim :])
    nested = jnp.repeat(weight.nested_absmax, NESTED_BLOCK, axis=-1)[..., :blocks].reshape(weight.absmax.shape)
    return _scale(_look_up(DYNAMIC_MAP, weight.absmax), nested, offset)


def _scale(number: jax.Array, nested: jax.Array, offset: jax.Array) -> jax.Array:
    """A block's fp32 scale, of what its code stands for."""
    # Product and sum round separately in the reference. The maximum changes no value, but a compiler that would contract the
    # two into a fused multiply-add (another last bit) cannot do it through it.
    return jnp.maximum(number * nested, jnp.finfo(jnp.float32).min) + offset


def _scales_of_columns(weight: Tensor) -> jax.Array:
    *leading, out, inner = weight.shape
    absmax = weight.absmax.reshape(*leading, inner // BLOCK, out)
    if weight.nested_absmax is None or weight.offset is None:
        return absmax
    groups = KINDS[weight.kind].nested_groups(inner)
    nested = weight.nested_absmax.reshape(*leading, groups, 1, out)
    value = _dynamic(absmax).reshape(*leading, groups, -1, out)
    return _scale(value, nested, weight.offset[..., None, None, None]).reshape(absmax.shape)


def _dynamic(index: jax.Array) -> jax.Array:
    """DYNAMIC_MAP[index] by selects: its negative half is the positive one, but for 1."""
    place = index.astype(jnp.int32) - 127
    size = jnp.abs(place)
    value = jnp.where(size == 128, 1.0, _select(DYNAMIC_MAP[127:255], size & 127))
    return jnp.where(place < 0, -value, value)


def _take(index: jax.Array) -> jax.Array:
    """One look-up for each weight, in the table of 16."""
    return _look_up(CODEBOOK, index)


def _tree(index: jax.Array) -> jax.Array:
    """15 selects, by the bits of the code from the lowest. A CPU's compiler hoists the constants out of a loop, as whole arrays."""
    return _select(CODEBOOK, index)


def _select(table: np.ndarray, index: jax.Array) -> jax.Array:
    """table[index] by selects, of a table of 2^n numbers."""
    values: list[Any] = [jnp.float32(value) for value in table]
    for bit in range(len(table).bit_length() - 1):
        is_set = (index >> bit) & 1 != 0
        values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    value: jax.Array = values[0]
    return value


LOOK_UPS: dict[str, Callable[[jax.Array], jax.Array]] = {"take": _take, "tree": _tree}
"""Codes, a uint8 each -> their values in fp32, before scaling. Both exact: which is faster depends on the compiler."""


def _values(index: jax.Array) -> jax.Array:
    """The look-up that was measured here, else that for the platform that is compiled for: a TPU has no fast gather."""
    form = choice.look_up()
    if form is not None:
        return LOOK_UPS[form](index)
    values: jax.Array = jax.lax.platform_dependent(index, tpu=_tree, default=_take)
    return values


def dequantize(weight: Tensor, dtype: Any = jnp.float32, look_up: Callable[[jax.Array], jax.Array] = _values) -> jax.Array:
    """[..., out, in] in `dtype`: `as_laid`, by one of `LOOK_UPS`; all give the same."""
    return weight.turned(as_laid(weight, dtype, look_up))


def as_laid(weight: Tensor, dtype: Any = jnp.float32, look_up: Callable[[jax.Array], jax.Array] = _values) -> jax.Array:
    """Codebook value times block scale in fp32, then cast, in memory's order."""
    out, inner = weight.matrix
    found, scales = look_up(weight.indices()), block_scales(weight)
    if weight.layout in COLUMNS:
        return (found * scales[..., None, None, :]).astype(dtype)
    if inner % BLOCK:  # a block runs over the end of a row
        scales = jnp.repeat(scales, BLOCK, axis=-1)[..., : out * inner].reshape(weight.shape)
    else:
        found, scales = found.reshape(*scales.shape, BLOCK), scales[..., None]
    return (found * scales).reshape(weight.shape).astype(dtype)


def _torch_mean(x: np.ndarray) -> np.float32:
    """Mean of fp32 [n], added up in the order of torch's CPU kernel on one thread (8 lanes, 4 rows, a cascade of 4 levels).

    The offset of double quantization is this mean: another order gives another last bit in two cases of five.
    """
    lanes, rows, levels = 8, 4, 4
    n = x.size
    vectors = n // lanes
    size = vectors // rows
    step = 1 << max(4, (max(size, 1) - 1).bit_length() // levels)
    partial = x[: size * rows * lanes].reshape(size, rows, lanes)
    total = np.zeros((rows, lanes), np.float32)
    for level in range(levels):
        whole = len(partial) // step * step if level < levels - 1 else 0
        total = total + _running_sum(partial[whole:])
        partial = _running_sum(partial[:whole].reshape(-1, step, rows, lanes).swapaxes(0, 1))
    first = _running_sum(x[size * rows * lanes : vectors * lanes].reshape(-1, lanes), total[0])
    per_lane = _running_sum(total[1:], first)
    return np.float32(_running_sum(per_lane, _running_sum(x[vectors * lanes :])) / np.float32(n))


def _running_sum(x: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
    """Sum over the first axis, strictly one after the other, in fp32."""
    total = np.zeros(x.shape[1:], np.float32) if start is None else start
    for row in x:
        total = total + row
    return total
