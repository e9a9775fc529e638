"""Frozen weights in 4 bits, as everything outside `ops` knows them. No jax at import: the estimator counts bytes by it.

Outside (on disk, in caches, exports and hashes) a matrix is its canonical parts: bitsandbytes' own bytes of NF4, gpt-oss's of MXFP4.
Inside, a `QuantizedTensor` holds the same codes as [..., out, in/2]: a TPU pads a small last axis sixty-fourfold. Values are equal to the
bit.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np

if TYPE_CHECKING:
    import jax

LAYOUTS = ("halves", "pairs")
"""Byte j of a row of codes holds weights j and j + in/2, or 2j and 2j + 1; the first of the two in the high nibble."""


def layout() -> str:
    """How codes lie in memory. Halves: nothing has to be interleaved, and on a TPU it is the only form that is not padded; a GPU's
    compiled program takes the same bytes for both."""
    return "halves"


@dataclass(frozen=True)
class Kind:
    """A storage format: `block` weights share a scale, in fp32, or in 8 bits where `nested` scales share an fp32 one or scales are powers
    of two. low_first: in canonical form the first of a byte's two weights is in the low nibble. rows: each is whole blocks."""

    module: str  # of moejax.models.ops: has `encode` and `Tensor`
    title: str
    block: int
    nested: int = 0
    scales: str = "absmax"
    scale_dtype: str = "float32"
    low_first: bool = False
    rows: bool = False

    @property
    def large(self) -> tuple[str, str]:
        """The parts that take the bytes: a code a weight, a scale a block."""
        return "codes", self.scales

    def parts(self, shape: tuple[int, ...], *, canonical: bool = False) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name -> (shape, dtype) of what stores a weight [..., out, in] in memory, or in canonical form. Raises ValueError for rows that
        the format does not have."""
        *leading, out, inner = shape
        if self.rows and inner % self.block:
            raise ValueError(f"a row of {inner} weights in {self.title}: expected a multiple of {self.block}")
        blocks = -(-out * inner // self.block)
        codes = (-(-out * inner // 2),) if canonical else (out, -(-inner // 2))
        scales = (blocks,) if canonical or inner % self.block else (out, inner // self.block)
        found: dict[str, tuple[tuple[int, ...], str]] = {"codes": (codes, "uint8")}
        found[self.scales] = (scales, self.scale_dtype)
        if self.nested:
            found |= {"nested_absmax": ((-(-blocks // self.nested),), "float32"), "offset": ((), "float32")}
        return {name: ((*leading, *part), dtype) for name, (part, dtype) in found.items()}

    def nbytes(self, shape: tuple[int, ...]) -> dict[str, int]:
        """Part -> bytes in memory of a weight [..., out, in]."""
        return {name: math.prod(part) * np.dtype(dtype).itemsize for name, (part, dtype) in self.parts(shape).items()}

    @property
    def bytes_per_weight(self) -> float:
        """Of a large matrix."""
        return 0.5 + (np.dtype(self.scale_dtype).itemsize + (4 / self.nested if self.nested else 0)) / self.block


KINDS = {
    "nf4": Kind("nf4", "NF4", 64),
    "nf4-double": Kind("nf4", "NF4, double", 64, nested=256, scale_dtype="uint8"),
    "mxfp4": Kind("mxfp4", "MXFP4", 32, scales="scales", scale_dtype="uint8", low_first=True, rows=True),
}


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight [..., out, in] in 4 bits; every index of the leading axes (layers, experts) is a matrix of its own.

    A pytree of its parts, each with the leading axes first: what slices all leaves slices the weight.
    """

    codes: jax.Array
    matrix: tuple[int, ...] = field(metadata={"static": True})
    layout: str = field(metadata={"static": True})

    @property
    def kind(self) -> str:
        """Its name in `KINDS`."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-2], *self.matrix)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """Weights."""
        return math.prod(self.shape)

    def parts(self) -> dict[str, Any]:
        """In memory, by name."""
        return {name: getattr(self, name) for name in KINDS[self.kind].parts(self.shape)}

    def with_parts(self, parts: Mapping[str, Any]) -> Self:
        return dataclasses.replace(self, **parts)

    def part(self, index: Any) -> Self:
        """Entry `index` of the leading axes."""
        return self.with_parts({name: part[index] for name, part in self.parts().items()})

    @property
    def is_whole(self) -> bool:
        """Whether all of its rows are here, and not a part of them on each device of a mesh."""
        return self.codes.shape[-2] == self.matrix[0]

    def gathered(self) -> Self:
        """All rows of a weight of which this device has a part."""
        from moejax.models.ops.spread import all_rows

        shapes = {name: shape for name, (shape, _) in KINDS[self.kind].parts(self.shape).items()}
        row = self.codes.ndim - 2
        return self.with_parts({name: a if a.shape == shapes[name] else all_rows(a, row) for name, a in self.parts().items()})

    def dequantize(self, dtype: Any) -> jax.Array:
        """[..., out, in] in `dtype`."""
        raise NotImplementedError

    tables: ClassVar[tuple[np.ndarray, ...]] = ()
    """What the two functions below look up: a kernel (`grouped/kernels.py`) takes constants as operands."""

    @staticmethod
    def scales_at(parts: Mapping[str, Callable[[Any], Any]], tables: tuple[Any, ...], blocks: jax.Array) -> jax.Array:
        """The scales of one matrix's blocks, as `values` takes them. parts: the entries of a part by their numbers, flat."""
        raise NotImplementedError

    @staticmethod
    def values(code: jax.Array, scales: jax.Array, tables: tuple[Any, ...], dtype: Any) -> jax.Array:
        """What `dequantize` gives for codes (int32) under these scales, to the bit."""
        raise NotImplementedError

    def indices(self) -> jax.Array:
        """Each weight's code: uint8 [..., out, in]."""
        import jax.numpy as jnp

        *leading, out, inner = self.shape
        high, low = self.codes >> 4, self.codes & 15
        # A CPU writes the halves' codes to memory, a byte each, and is still twice as fast as by any form in one loop.
        found = jnp.concatenate([high, low], -1) if self.layout == "halves" else jnp.stack([high, low], -1).reshape(*leading, out, -1)
        return found[..., :inner]

    def pack(self, name: str, part: Any, *, in_place: bool = False) -> Any:
        """A canonical part, with any leading axes, as it lies in memory. Codes are repacked on the host; in_place: where they are."""
        if name == "codes":
            return pack(np.asarray(part), self.matrix, self.layout, low_first=KINDS[self.kind].low_first, in_place=in_place)
        shape = KINDS[self.kind].parts(self.matrix)[name][0]
        return part.reshape((*part.shape[: part.ndim - (name != "offset")], *shape))

    def canonical(self) -> Canonical:
        """Its parts as they are on disk, in the host's memory."""
        kind = KINDS[self.kind]
        shapes = kind.parts(self.shape, canonical=True)
        parts = {name: np.asarray(part).reshape(shapes[name][0]) for name, part in self.parts().items() if name != "codes"}
        codes = unpack(np.asarray(self.codes), self.matrix, self.layout, low_first=kind.low_first)
        return Canonical(self.kind, self.shape, {"codes": codes} | parts)

    def random(self, key: jax.Array) -> QuantizedTensor:
        """Of an abstract one: random codes, and scales that give weights the standard deviation of an initialized model."""
        import jax
        import jax.numpy as jnp

        def fill(name: str, part: Any, key: jax.Array) -> jax.Array:
            if part.dtype == jnp.uint8 and name != "scales":
                return jax.random.bits(key, part.shape, jnp.uint8)
            return jnp.full(part.shape, {"nested_absmax": 0.005, "scales": 120}.get(name, 0.035), part.dtype)

        parts = self.parts()
        keys = jax.random.split(key, len(parts))
        return self.with_parts({name: fill(name, part, k) for (name, part), k in zip(parts.items(), keys, strict=True)})


class Canonical(NamedTuple):
    """A weight as it is outside: its parts by name, as arrays of the host."""

    kind: str
    shape: tuple[int, ...]
    parts: Mapping[str, Any]

    def tensor(self) -> QuantizedTensor:
        """In memory's form."""
        held = abstract(self.kind, self.shape)
        return held.with_parts({name: held.pack(name, part) for name, part in self.parts.items()})


def stored_parts(value: Any) -> Mapping[str, Any]:
    """A weight as it is outside, by part: its `Canonical` ones, an array's only one (""); their shapes and dtypes if it is abstract."""
    import jax

    if isinstance(value, QuantizedTensor):
        return {name: jax.ShapeDtypeStruct(*part) for name, part in KINDS[value.kind].parts(value.shape, canonical=True).items()}
    return value.parts if isinstance(value, Canonical) else {"": value}


def is_quantized(value: Any) -> bool:
    return isinstance(value, QuantizedTensor)


def storage(value: Any) -> str:
    """How a weight is stored, for people: "float32", "NF4, double"."""
    return KINDS[value.kind].title if isinstance(value, QuantizedTensor) else np.dtype(value.dtype).name


def dequantized(value: Any, dtype: Any) -> jax.Array:
    """A weight as an array, quantized or not."""
    array: jax.Array = value.dequantize(dtype) if isinstance(value, QuantizedTensor) else value.astype(dtype)
    return array


def abstract(kind: str, shape: tuple[int, ...]) -> QuantizedTensor:
    """The shapes and dtypes (`jax.ShapeDtypeStruct`) that `quantize` gives for a weight [..., out, in]."""
    import jax

    parts = {name: jax.ShapeDtypeStruct(*part) for name, part in KINDS[kind].parts(shape).items()}
    tensor: QuantizedTensor = tensor_type(kind)(**parts, matrix=tuple(shape[-2:]), layout=layout())
    return tensor


def encode(kind: str, weight: Any) -> Canonical:
    """A matrix [out, in], of any float dtype and concrete, in canonical form. Raises ValueError where it holds NaN or infinity."""
    return Canonical(kind, tuple(weight.shape), _module(kind).encode(weight, KINDS[kind]))


def quantize(kind: str, weight: Any) -> QuantizedTensor:
    """`encode` of every matrix of [..., out, in], in memory's form."""
    import jax
    import jax.numpy as jnp

    if weight.ndim > 2:
        return jax.tree.map(lambda *parts: jnp.stack(parts), *(quantize(kind, matrix) for matrix in weight))  # type: ignore[no-any-return]
    return jax.tree.map(jnp.asarray, encode(kind, weight).tensor())  # type: ignore[no-any-return]


def tensor_type(kind: str) -> Any:
    """The class of a kind's tensors."""
    return _module(kind).Tensor


def _module(kind: str) -> Any:
    return importlib.import_module(f"moejax.models.ops.{KINDS[kind].module}")


_AT_ONCE = 1 << 18  # bytes of codes: what is repacked stays in a core's cache


def pack(codes: np.ndarray, matrix: tuple[int, ...], layout: str, *, low_first: bool = False, in_place: bool = False) -> np.ndarray:
    """uint8 [..., ceil(out·in/2)], two neighbours a byte (low_first: the first in the low nibble), as rows [..., out, ceil(in/2)] of a
    layout.

    An odd row ends in a nibble of its own; the last one's is the canonical form's own, so that `unpack` gives back every bit.
    """
    out, inner = matrix
    if inner % 4 == 0:
        rows = codes.reshape(*codes.shape[:-1], out, inner // 2)
        into = rows if in_place else np.empty_like(rows)
        if layout == "halves":
            return _halves(rows, into, low_first)
        return _swapped(rows, into) if low_first else rows
    weights = _nibbles(codes, low_first)
    rows = np.zeros((*codes.shape[:-1], out, inner + inner % 2), np.uint8)
    rows[..., :inner] = weights[..., : out * inner].reshape(*codes.shape[:-1], out, inner)
    if out * inner % 2:
        rows[..., -1, -1] = weights[..., -1]
    first, second = np.split(rows, 2, axis=-1) if layout == "halves" else (rows[..., 0::2], rows[..., 1::2])
    return (first << 4) | second


def unpack(rows: np.ndarray, matrix: tuple[int, ...], layout: str, *, low_first: bool = False) -> np.ndarray:
    """The inverse of `pack`."""
    out, inner = matrix
    leading = rows.shape[:-2]
    weights = np.concatenate([rows >> 4, rows & 15], axis=-1) if layout == "halves" else _nibbles(rows)
    flat = weights[..., :inner].reshape(*leading, out * inner)
    if out * inner % 2:
        flat = np.concatenate([flat, weights[..., -1, -1:]], axis=-1)
    first, second = flat[..., 0::2], flat[..., 1::2]
    return (second << 4) | first if low_first else (first << 4) | second


def _nibbles(codes: np.ndarray, low_first: bool = False) -> np.ndarray:
    both = [codes & 15, codes >> 4] if low_first else [codes >> 4, codes & 15]
    return np.stack(both, axis=-1).reshape(*codes.shape[:-1], -1)


def _swapped(rows: np.ndarray, into: np.ndarray) -> np.ndarray:
    """Both nibbles of every byte in the other's place, in `into`."""
    high = rows << 4
    np.right_shift(rows, 4, out=into)
    into |= high
    return into


def _halves(rows: np.ndarray, into: np.ndarray, low_first: bool) -> np.ndarray:
    """Rows of pairs [..., in/2] as halves, in `into`: bytes j and j + in/4 hold what goes into bytes 2j and 2j + 1."""
    source, target = (a.reshape(-1, rows.shape[-1]) for a in (rows, into))
    half, step = rows.shape[-1] // 2, max(1, _AT_ONCE // rows.shape[-1])
    words = [np.empty((step, half), "<u2") for _ in range(3)]  # once: new memory costs as much as the work
    for row in range(0, len(source), step):
        piece = source[row : row + step]
        first, second, moved = (w[: len(piece)] for w in words)
        first[...], second[...] = piece[:, :half], piece[:, half:]
        for word in (first, second):  # a byte's two weights, a byte each
            np.left_shift(word, 4 if low_first else 8, out=moved)
            if not low_first:
                word >>= 4
            word |= moved
            word &= 0x0F0F
        first <<= 4
        first |= second
        target[row : row + step] = first.view(np.uint8)
    return into
