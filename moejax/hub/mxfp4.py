"""Checkpoints whose experts are in MXFP4, as gpt-oss's: codes and scales taken as they are.

In the place of a tensor over all experts, `NAME`, lie `NAME_blocks`, uint8 [E, out, in/32, 16], and `NAME_scales`, uint8 [E, out, in/32].
One expert's matrix is some of its rows, and rows have no scale in common: w1 and w3 are distinguished without a change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from moejax.errors import UserError
from moejax.hub.names import Part
from moejax.models.ops import mxfp4
from moejax.models.ops.quantized import Canonical, QuantizedTensor

BLOCKS, SCALES = "_blocks", "_scales"
_AGAIN = "download the checkpoint again"


class Packed:
    """A tensor over all experts, by its two parts (each a `stored.Source`). Raises UserError, with file and tensor, where they are not of
    one tensor."""

    def __init__(self, name: str, blocks: Any, scales: Any):
        self.name, self.file = name, blocks.file
        self.blocks, self.scales = blocks, scales
        for part in (blocks, scales):
            if part.dtype != np.uint8:
                raise UserError(f"{part.file.path}: tensor {part.name!r} is {part.dtype}: expected uint8, as MXFP4 is stored")
        if len(blocks.shape) != 4 or blocks.shape[3] != mxfp4.BLOCK // 2:
            raise UserError(
                f"{self.file.path}: tensor {blocks.name!r} has shape {list(blocks.shape)}, expected [experts, rows, blocks, 16]: MXFP4 has "
                "16 bytes a block of 32 weights"
            )
        if scales.shape != blocks.shape[:3]:
            raise UserError(
                f"{scales.file.path}: tensor {scales.name!r} has shape {list(scales.shape)}, expected {list(blocks.shape[:3])}: as many as "
                f"{blocks.name} has blocks"
            )
        self.shape = (*blocks.shape[:2], blocks.shape[2] * mxfp4.BLOCK)

    def matrix(self, part: Part) -> Matrix:
        """One expert's."""
        return Matrix(self, part.expert, part.rows(self.shape[1]))


class Matrix(NamedTuple):
    """Where one expert's matrix is read: it looks like any other source of a tensor (`stored.Source`), but reads as `Canonical`."""

    packed: Packed
    expert: int
    rows: slice

    @property
    def file(self) -> Any:
        return self.packed.file

    @property
    def name(self) -> str:
        """The checkpoint's name of what it is part of."""
        return f"{self.packed.name}{BLOCKS}"

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(range(*self.rows.indices(self.packed.shape[1]))), self.packed.shape[2])

    @property
    def nbytes(self) -> int:
        out, inner = self.shape
        return out * inner // mxfp4.BLOCK * (mxfp4.BLOCK // 2 + 1)

    def read(self) -> Canonical:
        """Raises UserError, with file and tensor, for a scale that is NaN, and one that makes a weight infinite."""
        blocks, scales = (self._of_expert(part) for part in (self.packed.blocks, self.packed.scales))
        fine = mxfp4.is_finite(blocks, scales)
        if not fine.all():
            row, block = (int(i) for i in np.argwhere(~fine)[0])
            row, scale = range(*self.rows.indices(self.packed.shape[1]))[row], int(scales[row, block])
            what = "which is no number (NaN)" if scale == mxfp4.NAN else f"2^{scale - mxfp4.BIAS}, under which a weight is infinite"
            part = self.packed.scales
            raise UserError(
                f"{part.file.path}: tensor {part.name!r} has the scale {scale} at {[self.expert, row, block]}, {what}: {_AGAIN}, or give "
                "another one"
            )
        return Canonical("mxfp4", self.shape, {"codes": blocks.reshape(-1), "scales": scales.reshape(-1)})

    def _of_expert(self, part: Any) -> np.ndarray:
        """Its rows, of all that is read of the expert: what stands between them is on the same pages of the disk."""
        shape = part.shape[1:]
        whole: np.ndarray = part._replace(shape=shape, first=self.expert * int(np.prod(shape))).read()
        return np.ascontiguousarray(whole[self.rows])


def gather(found: Mapping[str, Any]) -> dict[str, Any]:
    """Sources by name, with blocks and scales of each tensor as one `Packed`. Raises UserError where one of both is missing."""
    out: dict[str, Any] = {}
    for name, source in found.items():
        own = next((part for part in (BLOCKS, SCALES) if name.endswith(part)), None)
        if own is None:
            out[name] = source
            continue
        tensor, other = name.removesuffix(own), {BLOCKS: SCALES, SCALES: BLOCKS}[own]
        if tensor + other not in found:
            raise UserError(f"{source.file.path}: tensor {name!r} is of MXFP4, and {tensor + other!r} is missing: {_AGAIN}")
        if own == BLOCKS:
            out[tensor] = Packed(tensor, source, found[tensor + other])
    return out


def check(files: Mapping[str, Any], wanted: Iterable[tuple[str, Any]], expert_format: str | None) -> None:
    """Whether each tensor (name, abstract value) lies in the files as config.json says of the experts. Raises UserError."""
    for name, value in wanted:
        source = files.get(name)
        where = "" if source is None else f"{source.file.path}: tensor {source.name!r}"
        if isinstance(source, Matrix) and expert_format is None:
            raise UserError(f"{where} is in MXFP4, and config.json has no quantization_config that says so: {_AGAIN}, config.json too")
        if source is not None and not isinstance(source, Matrix) and isinstance(value, QuantizedTensor) and value.kind == "mxfp4":
            raise UserError(
                f"{where} is {source.dtype}, and by quantization_config in config.json it is in MXFP4: take quantization_config out there, "
                f"or {_AGAIN}"
            )
