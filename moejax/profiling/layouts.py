"""How a compiled TPU program lays its arrays out, read from its text: what padding adds to a buffer.

The last axes of a TPU's array are cut into tiles, `bf16[300,2]{1,0:T(8,128)(2,1)}` into tiles of 8 x 128 numbers: each of these axes is
filled up to whole tiles, and an axis of 2 takes the room of 128.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

LARGE = 16 * 10**6
"""Bytes from which on a buffer's padding matters."""
PADDED = 1.1
"""Padded is what takes this many times the bytes of its numbers: rows of 2880 take 2944."""
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\(")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_ALIASES = frozenset({"tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "opt-barrier", "after-all", "constant"})


class Buffer(NamedTuple):
    """An array of a program: bytes of its numbers, and those that it takes."""

    name: str
    shape: str
    bytes: float
    padded_bytes: float

    @property
    def factor(self) -> float:
        return self.padded_bytes / self.bytes


def buffers(text: str) -> Iterator[Buffer]:
    """Of `compiled.as_text()`: every array that an instruction makes, but for what stands inside a fusion or is another name of one."""
    fused = set(re.findall(r" fusion\(.*?calls=%?([\w.\-]+)", text))
    inside = ""
    for line in text.splitlines():
        if (header := _HEADER.match(line)) is not None:
            inside = header[1]
        elif inside not in fused and (found := _INSTRUCTION.match(line)) is not None and found[3] not in _ALIASES:
            for shape in _SHAPE.finditer(found[2]):
                numbers, padded = _numbers(shape[2], shape[3] or "", shape[4] or "")
                bits = _bits(shape[1])
                yield Buffer(found[1], shape[0], numbers * bits / 8, padded * bits / 8)


def padded(text: str, at_least: int = LARGE, factor: float = PADDED) -> list[Buffer]:
    """The buffers of a program that take this many bytes and `factor` times what their numbers need, the largest first."""
    found = {b.shape: b for b in buffers(text) if b.padded_bytes >= at_least and b.bytes and b.factor > factor}
    return sorted(found.values(), key=lambda b: -b.padded_bytes)


def _bits(kind: str) -> int:
    return 8 if kind == "pred" else int(size[0]) if (size := re.findall(r"\d+", kind)) else 0


def _numbers(dimensions: str, order: str, tiling: str) -> tuple[int, int]:
    """Of an array, and with its last axes (in memory's order) filled up to whole tiles."""
    sizes = [int(d) for d in dimensions.split(",") if d]
    minor_first = [sizes[int(axis)] for axis in order.split(",") if axis] or sizes[::-1]
    tile = re.search(r"T\(([\d,]+)\)", tiling)
    filled = list(minor_first)
    if tile is not None:
        for place, part in enumerate(reversed([int(p) for p in tile[1].split(",")])):
            if place < len(filled):
                filled[place] += -filled[place] % part
    return math.prod(sizes), math.prod(filled)
