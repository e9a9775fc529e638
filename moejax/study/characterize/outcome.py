"""What a trial knows when it starts, and what it hands back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moejax.study.characterize.plan import Task
from moejax.study.characterize.study import Study
from moejax.study.report.results import Environment, Row


@dataclass
class Outcome:
    """Rows, facts (plain JSON data) and a remark of a trial."""

    rows: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    message: str | None = None


@dataclass(frozen=True)
class Trial:
    """A task in its own process. limit: artificial, or None: the device's own."""

    task: Task
    study: Study
    environment: Environment
    limit: int | None

    def row(self, metric: str, value: float, unit: str, *, scope: str = "", experiment: str, batch: float | None = None,
            seq_len: int | None = None) -> Row:  # fmt: skip
        """A row of this trial's setting."""
        s, t = self.task.setting, self.task
        plain = value if isinstance(value, int) else float(value)
        data = "fixed" if t.batching == "fixed" and t.kind in ("breakdown", "length") else s.data
        length = t.row_tokens if seq_len is None else seq_len
        return Row(t.name, experiment, s.model, s.method, s.routing, data, t.batching, length, batch, scope, metric, plain, unit)
