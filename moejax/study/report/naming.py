"""Words for settings: what varies is in the name, what does not is said once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moejax.study.report.compare import Source
from moejax.study.report.results import Row

_WORDS = {
    "qlora": "QLoRA", "lora": "LoRA", "full": "full fine-tuning", "cs": "commonsense", "math": "math", "problems": "word problems",
    "fixed": "equal lengths", "pad_longest": "padded to the longest", "pack": "packed",
}  # fmt: skip
_VARYING = ("model", "method", "data", "batching", "seq_len")
Rows = list[tuple[Source, Row]]


class Naming:
    """Names of the settings of some rows (an experiment's, of all folders)."""

    def __init__(self, rows: Sequence[Row], columns: Sequence[str] = _VARYING):
        self.seen = {c: list(dict.fromkeys(getattr(r, c) for r in rows if getattr(r, c) is not None)) for c in columns}
        # A model's method seldom varies by itself: then it would only repeat.
        pairs = {(r.model, r.method) for r in rows}
        self.columns = [c for c in columns if len(self.seen[c]) > 1 and (c != "method" or len(pairs) > len({m for m, _ in pairs}))]

    def name(self, row: Row) -> str:
        """What distinguishes the row's setting from the others'; the model always."""
        columns = self.columns if "model" in self.columns else ["model", *self.columns]
        return ", ".join(said(c, getattr(row, c)) for c in columns if getattr(row, c) is not None)

    def constant(self) -> str:
        """What all share: "All: QLoRA, 128 tokens."; "" where nothing is."""
        same = [c for c in self.seen if c not in ("model", *self.columns) and len(self.seen[c]) == 1]
        words = ", ".join(dict.fromkeys(said(c, self.seen[c][0]) for c in same))
        return f"All: {words}." if words else ""


def said(column: str, value: Any) -> str:
    """A value of a column in words."""
    return f"{value} tokens" if column == "seq_len" else _WORDS.get(value, str(value)) if column != "model" else str(value)


def family(sources: Sequence[Source], model: str) -> str | None:
    """The study's model next to which this one stands; None: the study had none of its kind."""
    return next((known.family for source in sources for known in source.study.models if known.name == model), None)


def rows_of(sources: Sequence[Source], experiment: str, *metrics: str) -> Rows:
    """Of an experiment; of these metrics only, where any are named."""
    return [(source, row) for source in sources for row in source.study.of(experiment) if not metrics or row.metric in metrics]


def grouped(rows: Rows, name: Callable[[Row], str]) -> dict[str, Rows]:
    """By their names, in the order in which these come."""
    found: dict[str, Rows] = {}
    for source, row in rows:
        found.setdefault(name(row), []).append((source, row))
    return found
