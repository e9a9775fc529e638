"""The table behind `grouped_choice`, and its rule where nothing was measured. Without jax: the memory estimate reads it too."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from moejax.models.ops.choice_table import Table, read

TABLE = Path(__file__).with_name("grouped_choice.json")


def _table() -> Table:
    return read(TABLE)


def devices() -> tuple[str, ...]:
    """What was measured: see `Table`."""
    return tuple(_table())


def measured(platform: str, rows_per_expert: int, matrix: int, quantized: bool) -> dict[str, Any] | None:
    """The table's entry nearest to this shape: in mean rows of an expert and weights of a matrix, of the same storage where there is
    one; None for a device that has none."""

    def distance(entry: dict[str, Any]) -> float:
        rows = math.log2(entry["rows_per_expert"] / max(rows_per_expert, 1))
        weights = math.log2(entry["hidden"] * entry["intermediate"] / max(matrix, 1))
        return 100 * (entry["quantized"] != quantized) + abs(rows) + abs(weights)

    return min(_table().get(platform, []), key=distance, default=None)


def entry(
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
    tile = min(found["tile"], max(8, _power_of_two(mean_group // 2)))
    return found["backend"], tile, min(tile, found["small_tile"])


def _power_of_two(n: int) -> int:
    """The largest power of two that is at most n (1 for n < 1)."""
    return 1 << max(n, 1).bit_length() - 1
