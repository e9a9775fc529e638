"""What was measured for the nearest shape: the backend and tiles of grouped products, the form and chunk of the selective scan.

`choice.json` is written by `benchmarks/grouped_choice.py` and `benchmarks/scan_choice.py`: for an operation and a device ("cpu", or a
GPU's kind as jax names it) the shapes that were measured, what was fastest, and the file with the seconds; else a rule. What `moejax tune`
measured on this very machine comes first (`adopt`). No jax at import: the memory estimate reads it too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("choice.json")
SHAPES: dict[str, tuple[str, ...]] = {
    "grouped": ("rows_per_expert", "hidden", "intermediate", "quantized"), "scan": ("rows", "length", "channels"),
    "attention": ("length", "head_dim"), "look_up": (), "graphs": (), "remat": ("digest",),
}  # fmt: skip
"""Operation -> the names of what an entry was measured for."""
MANY_EXPERTS = 32
"""From here on the loop's launches count on a GPU: experts x layers x tiles of them a pass."""
MEMORY_SHARE = 24
"""`capacity` is chosen where a layer's dequantized experts take at most one part in this many of the device's memory."""
TPU_MEMORY_SHARE = 12
"""And `ragged`, on a TPU."""
TPU_ROWS = 128
"""`ragged`'s rows are filled up to a multiple of this many: of its kernel's smallest tile."""
TPU_TILES = 4
"""`loop`'s tiles there are all of one size, this many to a mean group: a second size is as much again to compile."""
TPU_TILE = 1024
"""Rows of the largest."""
CAPACITY_DEVIATIONS = 4
"""How far above the mean load `capacity`'s batch reaches, in standard deviations of a random routing: one has next to no row beyond."""
RULE = {"cpu": (128, 32), "gpu": (4096, 128)}
"""Rows of the largest tile and of a small one where nothing was measured. On a GPU a product of fewer rows than its matrix rate over its
bandwidth (117 on an RTX 5090, 180 on an H200, 400 on an L4) waits for its matrix: a smaller tile takes as long."""
ONE_TILE = 256
"""A group of at most this many rows is one tile on a GPU."""
DECODED_ROWS, DECODED_TILE = 256, 64
"""Mean rows of an expert up to which the backend `decode` multiplies by codes, and those of a tile: every one decodes them again."""
CHUNKS = {"chunked": 16, "chunked_associative": 32, "kernel": 16}
"""Tokens of a chunk of each form of the scan where nothing was measured: 16 was best on two CPU cores, 32 keeps a GPU's memory low; the
kernel keeps a state every 16."""


@cache
def table(operation: str) -> dict[str, list[dict[str, Any]]]:
    """Device -> entries."""
    found: dict[str, list[dict[str, Any]]] = json.loads(FILE.read_text(encoding="utf-8")).get(operation, {})
    return found


_adopted: dict[tuple[str, str], list[dict[str, Any]]] = {}


def adopt(device: str, entries: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """From here on in this process these entries (operation -> entries) stand before the table's of the device; no others do."""
    _adopted.clear()
    _adopted.update({(operation, device): list(of_operation) for operation, of_operation in entries.items()})


def adopted(device: str) -> dict[str, list[dict[str, Any]]]:
    """What `adopt` was given for the device."""
    return {operation: entries for (operation, of), entries in _adopted.items() if of == device and entries}


def devices() -> tuple[str, ...]:
    """On which anything was measured."""
    return tuple(device for operation in SHAPES for device in table(operation))


def here() -> str:
    """What is compiled for where this runs: "cpu", or the GPU's kind as jax names it ("NVIDIA H100 80GB HBM3")."""
    import jax

    platform = jax.default_backend()
    return platform if platform == "cpu" else str(jax.local_devices()[0].device_kind)


def is_tpu(platform: str) -> bool:
    """Of what `here` says: jax names a TPU's kind so ("TPU v5 lite")."""
    return platform.startswith("TPU")


def memory_here() -> int | None:
    """Bytes of this device's memory that jax may use; None on a CPU."""
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def _nearest(operation: str, platform: str, distance: Callable[[dict[str, Any]], float]) -> dict[str, Any] | None:
    entries = [*_adopted.get((operation, platform), ()), *table(operation).get(platform, ())]
    return min(entries, key=distance, default=None)


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
    hidden: int = 1024, intermediate: int = 1024, quantized: bool = False, item: int = 2, memory_bytes: int | None = None,
    asked: str = "auto", dealt: bool = False,
) -> tuple[str, int, int, int]:  # fmt: skip
    """For this device ("cpu", "gpu" or a GPU's kind) and size: the backend, and rows of a tile, of a small tile and of each expert in
    `capacity`'s batch.

    item: bytes of a number of the compute dtype; memory_bytes: of the device, None where unknown; asked: a backend by name, which then runs
    with the table's tiles, or "auto"; dealt: each device has some of the experts, and among its rows those for others', which `ragged` has
    the room of.

    Without a measurement: the loop; on a GPU `capacity` for many experts with rows for each; on a TPU `ragged`. Tiles are at most half the
    mean group if none larger was measured (on a GPU, where each is dozens of launches, at most the mean group, or one for all of a small
    group), and small ones take what is left of a group, so that padding stays at a few percent. `capacity` and `ragged`, measured or not,
    only where a layer's three matrices an expert are a small part of the memory.
    """
    load = tokens * experts_per_token / experts
    mean_group = max(1, int(load))
    most_rows = load + CAPACITY_DEVIATIONS * math.sqrt(load)
    capacity = min(tokens, 8 * math.ceil(most_rows / 8))
    found = measured(platform, mean_group, hidden * intermediate, quantized)
    if found is None:
        many = platform != "cpu" and experts >= MANY_EXPERTS and load >= 1
        found = dict(zip(("tile", "small_tile"), RULE["cpu" if platform == "cpu" else "gpu"], strict=True))
        found["backend"] = "ragged" if is_tpu(platform) else "capacity" if many else "loop"
    share = TPU_MEMORY_SHARE if is_tpu(platform) else MEMORY_SHARE
    if platform != "cpu" and found["backend"] != "decode" and 3 * experts * hidden * intermediate * item * share > (memory_bytes or 0):
        found = found | {"backend": "loop"}
    if asked != "auto" or (dealt and found["backend"] == "ragged"):
        found = found | {"backend": "loop" if asked == "auto" else asked}
    if found["backend"] == "decode":  # masks its rows
        return "decode", 0, 0, capacity
    if found["backend"] == "ragged":
        more = -tokens * experts_per_token % TPU_ROWS
        return "ragged", more, more, capacity
    if is_tpu(platform):
        tile = min(max(_power_of_two_in(mean_group / TPU_TILES), TPU_ROWS), TPU_TILE)
        return found["backend"], tile, tile, capacity
    most = _power_of_two_in(mean_group / 2)
    measured_for = found.get("rows_per_expert")
    if measured_for is None and platform != "cpu":
        most = _power_of_two_in(mean_group)
        holds_a_group = 2 * _power_of_two_in(most_rows - 1)
        if holds_a_group <= ONE_TILE:
            most = min(max(holds_a_group, found["small_tile"]), -(-tokens * experts_per_token // 8) * 8)
            found["small_tile"] = most
    elif measured_for is not None and 2 * found["tile"] > measured_for:  # a tile for all of an expert's rows: as large a part of them
        most = found["tile"] * mean_group // measured_for // 8 * 8
    tile = min(found["tile"], max(8, most))
    return found["backend"], tile, min(tile, found["small_tile"]), capacity


def _power_of_two_in(number: float) -> int:
    """The largest that is not above it, at least 1."""
    return 1 << max(int(number), 1).bit_length() - 1


def scan(platform: str, rows: int, length: int, channels: int, asked: str = "auto") -> tuple[str, int]:
    """Form and tokens of a chunk for this device ("cpu", "gpu" or a GPU's kind) and operands [rows, length, channels]. asked: a form by
    name, which then runs, or "auto".

    The nearest measured shape's, in the width (rows times channels: what runs in parallel) and the length. A device without a
    measurement: step by step inside a chunk on a CPU, whose cache likes it; associative elsewhere, where each step would be a launch. The
    kernel runs where it was measured, or is asked for.
    """
    nearest = _nearest("scan", platform, lambda e: _apart(e["rows"] * e["channels"], rows * channels) + _apart(e["length"], length))
    if nearest is not None and asked in ("auto", nearest["form"]):
        return nearest["form"], nearest["chunk"]
    form = asked if asked != "auto" else "chunked" if platform == "cpu" else "chunked_associative"
    return form, CHUNKS[form]


def attention(platform: str, length: int, head_dim: int) -> str | None:
    """"blocks" or "flash": what was measured for the nearest length of a row, among heads of as many numbers; None where nothing was."""
    nearest = _nearest("attention", platform, lambda e: 100 * (e["head_dim"] != head_dim) + _apart(e["length"], length))
    return None if nearest is None or nearest["head_dim"] != head_dim else str(nearest["form"])


def look_up() -> str | None:
    """The look-up of 4-bit codes that was measured on this device (one of `nf4.LOOK_UPS`); None where none was."""
    entries = [entry for (operation, _), of_device in _adopted.items() if operation == "look_up" for entry in of_device]
    return str(entries[0]["form"]) if entries else None
