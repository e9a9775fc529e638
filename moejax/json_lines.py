"""The lines of a run's metrics.jsonl, also where a full disk or a machine that stopped left half of one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moejax.files import replace_text


def read(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The records in order, and the numbers of the lines that are none: cut off, or damaged. Raises OSError."""
    records, damaged = [], []
    # Not splitlines: a text may hold a line separator of Unicode's.
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        if not line:
            continue
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError
        except (ValueError, TypeError, KeyError, RecursionError):
            damaged.append(number)
        else:
            records.append(record)
    return records, damaged


def keep_until(path: Path, step: int, warn: Callable[[str], None]) -> None:
    """A resumed run repeats the steps after its checkpoint: their lines go, and those that are not whole, with a warning.

    Replaced whole. Raises OSError."""
    records, damaged = read(path)
    if damaged:
        lines = f"line {damaged[0]} is" if len(damaged) == 1 else f"{len(damaged)} lines (the first: {damaged[0]}) are"
        warn(f"warning: {path}: {lines} not whole (a full disk, or a machine that stopped, leaves that): dropped")
    replace_text(path, "".join(json.dumps(record) + "\n" for record in records if record["step"] <= step))
