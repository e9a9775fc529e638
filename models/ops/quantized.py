"""Frozen weights in 4 bits, as everything outside `ops` knows them. No jax at import: the estimator counts bytes by it.

Outside (on disk, in caches, exports and hashes) a matrix is its canonical parts: bitsandbytes' own bytes of NF4, gpt-oss's of MXFP4.
Inside, a `QuantizedTensor` holds the same codes as [..., out, in/2], and on a TPU, which pads a small last axis sixty-fourfold, as
[..., in/2, out]. Values are equal to the bit.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np

from moejax.models.ops import choice, tiles
from moejax.models.ops.nibbles import pack, unpack

if TYPE_CHECKING:
    import jax

LAYOUTS = ("halves", "pairs", "columns", "sixteens")
"""Byte j of a row of codes holds weights j and j + in/2, or 2j and 2j + 1; the first of the two in the high nibble. Columns: the axes of a
matrix changed, codes [..., in/2, out], where a block is halves (of one of 64 bytes j to j + 31 hold its weights j and j + 32); scales by
block and row, `tiles.folded`; scales of scales repeated for each row. So nothing but the shift depends on the place in a block.
Sixteens: columns in a TPU's host memory, bytes as [..., in/32, 16, out]. Of 32 rows and more a TPU's tiles have 32, but its products want
tiles of 8, and its compiler would lay the whole stack anew in every layer."""
COLUMNS = LAYOUTS[2:]


def layout(platform: str) -> str:
    """How codes lie in memory on a device (as `choice.here` says it). Halves: nothing has to be interleaved; a GPU's compiled program takes
    the same bytes for pairs. Columns: nothing but wide last axes, and a scale is one lane's along a block."""
    return "columns" if choice.is_tpu(platform) else "halves"


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

    def fitting(self, shape: tuple[int, ...], layout: str) -> str:
        """The layout that a weight [..., out, in] has where this one is asked for: columns are for rows of whole blocks, and many."""
        return "halves" if layout in COLUMNS and (shape[-1] % self.block or shape[-2] < tiles.LANES) else layout

    def nested_groups(self, inner: int) -> int:
        """Of a row's blocks: groups of neighbours that have one scale of scales in every row."""
        blocks = inner // self.block
        return blocks // math.gcd(blocks, self.nested)

    def parts(self, shape: tuple[int, ...], layout: str = "halves", *, canonical: bool = False) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name -> (shape, dtype) of what stores a weight [..., out, in] in memory, or in canonical form. layout: one that is `fitting`.
        Raises ValueError for rows that the format does not have."""
        *leading, out, inner = shape
        if self.rows and inner % self.block:
            raise ValueError(f"a row of {inner} weights in {self.title}: expected a multiple of {self.block}")
        blocks = -(-out * inner // self.block)
        codes: tuple[int, ...] = (-(-out * inner // 2),) if canonical else (out, -(-inner // 2))
        scales: tuple[int, ...] = (blocks,) if canonical or inner % self.block else (out, inner // self.block)
        nested: tuple[int, ...] = (-(-blocks // self.nested),) if self.nested else ()
        if layout in COLUMNS and not canonical:
            codes, scales = (inner // 2, out), tiles.folded(inner // self.block, out)
            if layout == "sixteens":
                codes, scales = tiles.in_sixteens(codes), scales if self.scale_dtype == "float32" else tiles.in_sixteens(scales)
            nested = tiles.folded(self.nested_groups(inner), out) if self.nested else ()
        found: dict[str, tuple[tuple[int, ...], str]] = {"codes": (codes, "uint8"), self.scales: (scales, self.scale_dtype)}
        if self.nested:
            found |= {"nested_absmax": (nested, "float32"), "offset": ((), "float32")}
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
        return (*self.codes.shape[: -self._axes], *self.matrix)

    @property
    def _axes(self) -> int:
        """Of a matrix's codes."""
        return len(KINDS[self.kind].parts(self.matrix, self.layout)["codes"][0])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """Weights."""
        return math.prod(self.shape)

    def parts(self) -> dict[str, Any]:
        """In memory, by name."""
        return {name: getattr(self, name) for name in KINDS[self.kind].parts(self.shape, self.layout)}

    def with_parts(self, parts: Mapping[str, Any]) -> Self:
        return dataclasses.replace(self, **parts)

    def part(self, index: Any) -> Self:
        """Entry `index` of the leading axes."""
        return self.with_parts({name: part[index] for name, part in self.parts().items()})

    @property
    def is_whole(self) -> bool:
        """Whether all of it is here, and not a part on each device of a mesh."""
        return bool(self.codes.shape == self._shapes()["codes"])

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (shape, _) in KINDS[self.kind].parts(self.shape, self.layout).items()}

    def gathered(self) -> Self:
        """All of a weight of which this device has a part."""
        from moejax.models.ops.spread import all_rows

        def gather(part: jax.Array, whole: tuple[int, ...]) -> jax.Array:
            own = next((axis for axis, (a, b) in enumerate(zip(part.shape, whole, strict=True)) if a != b), None)
            return part if own is None else all_rows(part, own)

        shapes = self._shapes()
        return self.with_parts({name: gather(part, shapes[name]) for name, part in self.parts().items()})

    def in_host(self, put: Callable[[Any], Any]) -> Self:
        """With codes and scales where `put` puts an array, as they lie there. Scales of scales stay: they are one part in two thousand, and
        as many fetches again."""
        layout = "sixteens" if self.layout == "columns" else self.layout
        shapes = KINDS[self.kind].parts(self.shape, layout)
        parts = {name: put(_shaped(part, shapes[name][0])) for name, part in self.parts().items() if name in KINDS[self.kind].large}
        return dataclasses.replace(self, layout=layout, **parts)

    def dequantize(self, dtype: Any) -> jax.Array:
        """[..., out, in] in `dtype`."""
        return self.turned(self.as_laid(dtype))

    def as_laid(self, dtype: Any) -> jax.Array:
        """The weights in `dtype` in memory's order: [..., out, in], of columns [..., in/block, 2, block/2, out]."""
        raise NotImplementedError

    def turned(self, values: jax.Array) -> jax.Array:
        """What `as_laid` gives, as [..., out, in]. (Apart from it: a TPU's compiler would take the change of shape before the products, and
        make an array of the scales of all weights.)"""
        if self.layout not in COLUMNS:
            return values
        *leading, out, inner = self.shape
        return values.reshape(*leading, inner, out).swapaxes(-1, -2)

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
        """Each weight's code, uint8, in memory's order."""
        import jax.numpy as jnp

        *leading, out, inner = self.shape
        if self.layout in COLUMNS:
            half = KINDS[self.kind].block // 2
            both = self.codes.reshape(*leading, inner // half // 2, 1, half, out)
            return (both >> jnp.array([4, 0], jnp.uint8)[:, None, None]) & 15
        high, low = self.codes >> 4, self.codes & 15
        # A CPU writes the halves' codes to memory, a byte each, and is still twice as fast as by any form in one loop.
        found = jnp.concatenate([high, low], -1) if self.layout == "halves" else jnp.stack([high, low], -1).reshape(*leading, out, -1)
        return found[..., :inner]

    def pack(self, name: str, part: Any, *, in_place: bool = False) -> Any:
        """A canonical part, with any leading axes, as it lies in memory. Codes, and columns, are repacked on the host; in_place: where
        they are, if `packs_in_place` says so."""
        kind = KINDS[self.kind]
        if name == "codes":
            if self.layout in COLUMNS:
                rows = pack(np.asarray(part), self._blocks, "halves", low_first=kind.low_first, in_place=in_place)
                leading, shape = rows.shape[:-2], kind.parts(self.matrix, self.layout)[name][0]
                return np.ascontiguousarray(rows.reshape(*leading, self.matrix[0], -1).swapaxes(-1, -2)).reshape(*leading, *shape)
            return pack(np.asarray(part), self.matrix, self.layout, low_first=kind.low_first, in_place=in_place)
        leading = part.shape[: part.ndim - (name != "offset")]
        shape = kind.parts(self.matrix, self.layout)[name][0]
        if self.layout in COLUMNS and name != "offset":
            out, inner = self.matrix
            if name == "nested_absmax":
                groups = kind.nested_groups(inner)
                part = np.repeat(part, kind.nested * groups * kind.block // inner, axis=-1)[..., : out * groups]
            part = np.ascontiguousarray(np.asarray(part).reshape(*leading, out, -1).swapaxes(-1, -2))
        return part.reshape((*leading, *shape))

    @property
    def _blocks(self) -> tuple[int, int]:
        block = KINDS[self.kind].block
        return self.matrix[0] * self.matrix[1] // block, block

    def packs_in_place(self, name: str) -> bool:
        """Whether `pack` in place leaves its result in the memory that it is given."""
        return name == "offset" or (self.layout not in COLUMNS and (name != "codes" or self.matrix[1] % 4 == 0))

    def canonical(self) -> Canonical:
        """Its parts as they are on disk, in the host's memory."""
        kind, (*leading, out, inner) = KINDS[self.kind], self.shape
        shapes = kind.parts(self.shape, canonical=True)

        def flat(name: str, part: np.ndarray) -> np.ndarray:
            if self.layout in COLUMNS and name != "offset":
                part = part.reshape(*leading, -1, out).swapaxes(-1, -2)
            if name == "codes":
                matrix, laid = (self._blocks, "halves") if self.layout in COLUMNS else (self.matrix, self.layout)
                return unpack(part.reshape(*leading, matrix[0], -1), matrix, laid, low_first=kind.low_first)
            if self.layout in COLUMNS and name == "nested_absmax":
                part = part.reshape(*leading, -1)[..., :: kind.nested * kind.nested_groups(inner) * kind.block // inner]
            return part.reshape(shapes[name][0])

        return Canonical(self.kind, self.shape, {name: flat(name, np.asarray(part)) for name, part in self.parts().items()})

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


def _shaped(array: Any, shape: tuple[int, ...]) -> Any:
    import jax

    return jax.ShapeDtypeStruct(shape, array.dtype) if isinstance(array, jax.ShapeDtypeStruct) else array.reshape(shape)


class Canonical(NamedTuple):
    """A weight as it is outside: its parts by name, as arrays of the host."""

    kind: str
    shape: tuple[int, ...]
    parts: Mapping[str, Any]

    def tensor(self, layout: str = "halves") -> QuantizedTensor:
        """In memory's form."""
        held = abstract(self.kind, self.shape, layout)
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


def abstract(kind: str, shape: tuple[int, ...], layout: str = "halves") -> QuantizedTensor:
    """The shapes and dtypes (`jax.ShapeDtypeStruct`) that `quantize` gives for a weight [..., out, in]."""
    import jax

    fitting = KINDS[kind].fitting(shape, layout)
    parts = {name: jax.ShapeDtypeStruct(*part) for name, part in KINDS[kind].parts(shape, fitting).items()}
    tensor: QuantizedTensor = tensor_type(kind)(**parts, matrix=tuple(shape[-2:]), layout=fitting)
    return tensor


def encode(kind: str, weight: Any) -> Canonical:
    """A matrix [out, in], of any float dtype and concrete, in canonical form. Raises ValueError where it holds NaN or infinity."""
    return Canonical(kind, tuple(weight.shape), _module(kind).encode(weight, KINDS[kind]))


def quantize(kind: str, weight: Any, layout: str = "halves") -> QuantizedTensor:
    """`encode` of every matrix of [..., out, in], in memory's form."""
    import jax
    import jax.numpy as jnp

    if weight.ndim > 2:
        parts = (quantize(kind, matrix, layout) for matrix in weight)
        return jax.tree.map(lambda *parts: jnp.stack(parts), *parts)  # type: ignore[no-any-return]
    return jax.tree.map(jnp.asarray, encode(kind, weight).tensor(layout))  # type: ignore[no-any-return]


def tensor_type(kind: str) -> Any:
    """The class of a kind's tensors."""
    return _module(kind).Tensor


def _module(kind: str) -> Any:
    return importlib.import_module(f"moejax.models.ops.{KINDS[kind].module}")
