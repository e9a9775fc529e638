"""Which form of the selective scan runs and in chunks of how many tokens: a table of measurements by device, else a rule.

`scan_choice.json` is written by `benchmarks/scan_choice.py`. Without jax: the memory estimate reads it too.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from moejax.models.ops.choice_table import Table, read

TABLE = Path(__file__).with_name("scan_choice.json")
CHUNKS = {"chunked": 16, "chunked_associative": 32}
"""Tokens of a chunk of either form where nothing was measured: 16 was best on two CPU cores, 32 keeps a GPU's memory low."""


def _table() -> Table:
    return read(TABLE)


def devices() -> tuple[str, ...]:
    """What was measured: see `Table`."""
    return tuple(_table())


def entry(platform: str, rows: int, length: int, channels: int) -> tuple[str, int]:
    """Form and tokens of a chunk for this device ("cpu", "gpu" or a GPU's kind) and operands [rows, length, channels].

    The nearest measured shape's, in the width (rows times channels: what runs in parallel) and the length. A device without a
    measurement: step by step inside a chunk on a CPU, whose cache likes it; associative elsewhere, where each step would be a launch.
    """

    def distance(found: dict[str, Any]) -> float:
        width = math.log2(found["rows"] * found["channels"] / max(rows * channels, 1))
        return abs(width) + abs(math.log2(found["length"] / max(length, 1)))

    nearest = min(_table().get(platform, []), key=distance, default=None)
    if nearest is not None:
        return nearest["form"], nearest["chunk"]
    form = "chunked" if platform == "cpu" else "chunked_associative"
    return form, CHUNKS[form]
