"""Which backend of the grouped matmul runs, and with which tile: a table of measurements by device, else a rule.

`grouped_choice.json` is written by `benchmarks/grouped_choice.py`: for each kind of device the shapes that were measured there, what was
fastest, and the file with the seconds. A shape between them takes the nearest one's choice.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import jax

from models.ops.expert_tile import Plan

BACKENDS = ("loop", "capacity", "ragged")
TABLE = Path(__file__).with_name("grouped_choice.json")
CAPACITIES = (1.125, 1.5, 2.0)
"""Rows per expert that `capacity` is compiled for, in mean loads; a larger load goes through the loop."""


def here() -> str:
    """What is compiled for where this runs: "cpu", or the GPU's kind as jax names it ("NVIDIA H100 80GB HBM3")."""
    platform = jax.default_backend()
    return platform if platform == "cpu" else str(jax.local_devices()[0].device_kind)


@cache
def _table() -> dict[str, list[dict[str, Any]]]:
    table: dict[str, list[dict[str, Any]]] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def measured(platform: str, rows_per_expert: int, matrix: int, nf4: bool) -> dict[str, Any] | None:
    """The table's entry nearest to this shape: in mean rows of an expert and weights of a matrix, of the same storage where there is
    one; None for a device that has none."""

    def distance(entry: dict[str, Any]) -> float:
        rows = math.log2(entry["rows_per_expert"] / max(rows_per_expert, 1))
        weights = math.log2(entry["hidden"] * entry["intermediate"] / max(matrix, 1))
        return 100 * (entry["nf4"] != nf4) + abs(rows) + abs(weights)

    return min(_table().get(platform, []), key=distance, default=None)


def choose(
    backend: str,
    platform: str,
    tokens: int,
    experts: int,
    experts_per_token: int,
    *,
    hidden: int = 1024,
    intermediate: int = 1024,
    nf4: bool = False,
) -> Plan:
    """The plan for this device and size. Raises ValueError for a backend that does not exist.

    platform: "cpu", "gpu", or a GPU's kind. A forced backend takes its tile from the table all the same. Without a measurement: the
    loop, with tiles of at most 512 rows (fewer launches than a CPU's 128). Tiles are at most half the mean group, and small ones take
    what is left of a group, so that padding stays at a few percent.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"moe_backend = {backend!r}: expected one of {['auto', *BACKENDS]}")
    mean_group = max(1, tokens * experts_per_token // experts)
    entry = measured(platform, mean_group, hidden * intermediate, nf4)
    if entry is None:
        entry = {"backend": "loop"} | dict(zip(("tile", "small_tile"), (128, 32) if platform == "cpu" else (512, 64), strict=True))
    tile = min(entry["tile"], max(8, _power_of_two(mean_group // 2)))
    capacities = sorted({min(tokens, 8 * math.ceil(mean_group * c / 8)) for c in CAPACITIES})
    return Plan(
        entry["backend"] if backend == "auto" else backend, tile, min(tile, entry["small_tile"]), capacities=tuple(capacities)
    )


def _power_of_two(n: int) -> int:
    """The largest power of two that is at most n (1 for n < 1)."""
    return 1 << max(n, 1).bit_length() - 1
