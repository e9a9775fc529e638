"""What was measured for the nearest shape: the backend and tiles of grouped products, the form and chunk of the selective scan.

`choice.json` is written by `benchmarks/grouped_choice.py` and `benchmarks/scan_choice.py`: for an operation and a device ("cpu", or a
GPU's kind as jax names it) the shapes that were measured, what was fastest, and the file with the seconds; else a rule. No jax at import:
the memory estimate reads it too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("choice.json")
SHAPES = {"grouped": ("rows_per_expert", "hidden", "intermediate", "quantized"), "scan": ("rows", "length", "channels")}
"""Operation -> the names of what an entry was measured for."""
CHUNKS = {"chunked": 16, "chunked_associative": 32}
"""Tokens of a chunk of either form of the scan where nothing was measured: 16 was best on two CPU cores, 32 keeps a GPU's memory low."""


@cache
def table(operation: str) -> dict[str, list[dict[str, Any]]]:
    """Device -> entries."""
    found: dict[str, list[dict[str, Any]]] = json.loads(FILE.read_text(encoding="utf-8"))[operation]
    return found


def devices() -> tuple[str, ...]:
    """On which anything was measured."""
    return tuple(device for operation in SHAPES for device in table(operation))


def here() -> str:
    """What is compiled for where this runs: "cpu", or the GPU's kind as jax names it ("NVIDIA H100 80GB HBM3")."""
    import jax

    platform = jax.default_backend()
    return platform if platform == "cpu" else str(jax.local_devices()[0].device_kind)


def _nearest(operation: str, platform: str, distance: Callable[[dict[str, Any]], float]) -> dict[str, Any] | None:
    return min(table(operation).get(platform, []), key=distance, default=None)


def _apart(one: float, other: float) -> float:
    return abs(math.log2(one / max(other, 1)))


def measured(platform: str, rows_per_expert: int, matrix: int, quantized: bool) -> dict[str, Any] | None:
    """The entry of grouped products nearest to this shape: in mean rows of an expert and weights of a matrix, of the same storage where
    there is one; None for a device that has none."""

    def distance(entry: dict[str, Any]) -> float:
        weights = _apart(entry["hidden"] * entry["intermediate"], matrix)
        return 100 * (entry["quantized"] != quantized) + _apart(entry["rows_per_expert"], rows_per_expert) + weights

    return _nearest("grouped", platform, distance)


def grouped(
    platform: str, tokens: int, experts: int, experts_per_token: int, *,
    hidden: int = 1024, intermediate: int = 1024, quantized: bool = False,
) -> tuple[str, int, int]:  # fmt: skip
    """Backend, rows of a tile and of a small tile for this device ("cpu", "gpu" or a GPU's kind) and size.

    Without a measurement: the loop, with tiles of at most 512 rows (fewer launches than a CPU's 128). Tiles are at most half the mean
    group, and small ones take what is left of a group, so that padding stays at a few percent.
    """
    mean_group = max(1, tokens * experts_per_token // experts)
    found = measured(platform, mean_group, hidden * intermediate, quantized)
    if found is None:
        found = {"backend": "loop"} | dict(zip(("tile", "small_tile"), (128, 32) if platform == "cpu" else (512, 64), strict=True))
    half = 1 << max(mean_group // 2, 1).bit_length() - 1  # the largest power of two that is in it
    tile = min(found["tile"], max(8, half))
    return found["backend"], tile, min(tile, found["small_tile"])


def scan(platform: str, rows: int, length: int, channels: int) -> tuple[str, int]:
    """Form and tokens of a chunk for this device ("cpu", "gpu" or a GPU's kind) and operands [rows, length, channels].

    The nearest measured shape's, in the width (rows times channels: what runs in parallel) and the length. A device without a
    measurement: step by step inside a chunk on a CPU, whose cache likes it; associative elsewhere, where each step would be a launch.
    """
    nearest = _nearest("scan", platform, lambda e: _apart(e["rows"] * e["channels"], rows * channels) + _apart(e["length"], length))
    if nearest is not None:
        return nearest["form"], nearest["chunk"]
    form = "chunked" if platform == "cpu" else "chunked_associative"
    return form, CHUNKS[form]
