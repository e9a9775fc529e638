"""Tables of measured choices by device, as benchmarks write them. Without jax: the memory estimate reads them too."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

Table = dict[str, list[dict[str, Any]]]
"""Entries of a shape each, by what they were measured on, as jax names it: "cpu", and kinds of GPUs."""


@cache
def read(path: Path) -> Table:
    table: Table = json.loads(path.read_text(encoding="utf-8"))
    return table
