"""Several characterizations side by side: what to call each, and which of their settings stand in one row."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moejax.study.report import results
from moejax.study.report.page import Number
from moejax.study.report.quantities import rounded

# In this order: the first that tells all folders apart is the label; else all that differ.
_TELLING = ("device", "memory", "jax", "jaxlib", "moejax", "preset")


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
    """Read the folders. Raises UserError as `results.read` does."""
    studies = [results.read(folder) for folder in folders]
    names = labels(studies, [Path(f) for f in folders])
    return [Source(i, Path(f), n, s) for i, (f, n, s) in enumerate(zip(folders, names, studies, strict=True))]


def labels(studies: Sequence[results.Study], folders: Sequence[Path]) -> list[str]:
    """A short name for each: what tells them apart, device before versions before settings; else its folder."""
    facts = [_facts(s) for s in studies]
    if len(studies) == 1:
        return [str(facts[0]["device"])]
    differing = [k for k in dict.fromkeys(k for f in facts for k in f) if len({f.get(k) for f in facts}) > 1]
    for key in _TELLING:
        if key in differing and _unique(found := [_said(key, f.get(key)) for f in facts]):
            return found
    chosen = [k for k in _TELLING if k in differing] or list({k.rsplit(".", 1)[-1]: k for k in reversed(differing)}.values())[-2:]
    if chosen and _unique(found := [", ".join(_said(k, f.get(k)) for k in chosen) for f in facts]):
        return found
    names = [f.resolve().name for f in folders]
    return names if _unique(names) else [str(f) for f in folders]


def _said(key: str, value: Any) -> str:
    if value is None:
        return f"{key}: none"
    return str(value) if key in ("device", "memory", "preset") else f"{key.rsplit('.', 1)[-1]} {value}"


def _unique(names: Sequence[str]) -> bool:
    return len(set(names)) == len(names)


def _facts(study: results.Study) -> dict[str, Any]:
    """What may tell two apart, flat; hashes and dates tell nothing to a reader."""
    environment = study.environment
    memory = rounded(environment.memory_bytes, "B") if environment.memory_bytes else None
    facts: dict[str, Any] = {"device": environment.device, "memory": memory, **environment.versions, "preset": study.preset}
    facts |= {f"config.{key}": json.dumps(value) if isinstance(value, list) else value for key, value in flat(study.config)}
    return facts | {"commit": environment.git_commit, "cpu": environment.cpu}


def flat(content: dict[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    """Nested settings as (dotted key, value)."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


ONE, DENSE, LARGEST = "batch 1", "dense's largest batch", "largest batch"


def role(batch: float, routing: str, batches: dict[str, list[float]]) -> str:
    """What a batch size stands for, the same on a small GPU and on a large one. batches: all of this model's by routing."""
    if batch == 1:
        return ONE
    if batch == max(batches[routing]):
        return LARGEST
    if routing == "sparse" and batches.get("dense") and batch == max(batches["dense"]):
        return DENSE
    return f"batch {batch:g}"


def batches(rows: Iterable[results.Row]) -> dict[str, list[float]]:
    """Routing -> its batch sizes, of rows of one model and data set."""
    found: dict[str, set[float]] = {}
    for row in rows:
        if row.routing and row.batch is not None:
            found.setdefault(row.routing, set()).add(row.batch)
    return {routing: sorted(sizes) for routing, sizes in found.items()}

