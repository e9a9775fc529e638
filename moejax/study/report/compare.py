"""Several characterizations side by side: what to call each, and which of their settings stand in one row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moejax.study.report import results
from moejax.study.report.page import Number
from moejax.study.report.quantities import rounded


@dataclass(frozen=True, eq=False)
class Source:
    """One folder. `index`: its place among the folders given."""

    index: int
    folder: Path
    label: str
    study: results.Study

    @cached_property
    def _lines(self) -> dict[int, int]:
        return {id(row): line for line, row in enumerate(self.study.rows, 2)}

    def number(self, row: results.Row) -> Number:
        """A row's value: exactly as its results.csv has it, with its line there."""
        return Number(rounded(row.value, row.unit), repr(row.value), "ours", f"{self.index}:{self._lines[id(row)]}")


def load(folders: Sequence[str | Path]) -> list[Source]:
    """Read the folders; each is called by its device, or by its name where devices repeat. Raises UserError as `results.read` does."""
    studies = [results.read(folder) for folder in folders]
    labels = [study.environment.device for study in studies]
    for names in ([Path(f).resolve().name for f in folders], [str(f) for f in folders]):
        if len(set(labels)) < len(labels):
            labels = names
    return [Source(i, Path(f), n, s) for i, (f, n, s) in enumerate(zip(folders, labels, studies, strict=True))]


def flat(content: dict[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    """Nested settings as (dotted key, value)."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def role(row: results.Row, rows: Iterable[results.Row]) -> str:
    """What a row's batch size stands for among all of its model's, the same on a small GPU and on a large one."""
    most: dict[str, float] = {}
    for other in rows:
        if other.routing and other.batch is not None:
            most[other.routing] = max(other.batch, most.get(other.routing, 0))
    if row.routing is None or row.batch is None:
        return ""
    if row.batch == 1:
        return "batch 1"
    if row.batch == most[row.routing]:
        return "largest batch"
    return "dense's largest batch" if row.routing == "sparse" and row.batch == most.get("dense") else f"batch {row.batch:g}"
