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
DATASET = {"cs": "commonsense_15k", "math": "math_14k"}
"""Our name of a data set -> the study's."""
REFERENCE = {"mixtral": "Mixtral-8x7B", "blackmamba": "BlackMamba-2.8B"}
"""Family -> the study's model, in PyTorch: named wherever a number of it stands beside a model of ours, which may be a tiny one."""


def dataset(data: str | None) -> tuple[str, bool]:
    """The study's data set beside which ours stands, and whether it is the same; it has no others: commonsense."""
    return DATASET.get(data or "", DATASET["cs"]), data in DATASET


Rows = list[tuple[Source, Row]]


class Naming:
    """Names of the settings of some rows (an experiment's, of all folders)."""

    def __init__(self, of: Rows, columns: Sequence[str] = _VARYING):
        rows = [row for _, row in of]
        self.seen = {c: list(dict.fromkeys(getattr(r, c) for r in rows if getattr(r, c) is not None)) for c in columns}
        # A model's method and the kind of batches of a data set seldom vary by themselves: then they would only repeat.
        self.columns = [c for c in columns if len(self.seen[c]) > 1 and not (c == "method" and self._follows(rows, c, "model"))]
        if "data" in self.columns and self._follows(rows, "batching", "data"):
            self.columns = [c for c in self.columns if c != "batching"]

    @staticmethod
    def _follows(rows: Sequence[Row], column: str, other: str) -> bool:
        pairs = {(getattr(r, other), getattr(r, column)) for r in rows if getattr(r, column) is not None}
        return len(pairs) == len({other for other, _ in pairs})

    def name(self, row: Row, *more: str) -> str:
        """What tells the row's setting from the others', and `more`; the model always."""
        columns = self.columns if "model" in self.columns else ["model", *self.columns]
        return ", ".join([*(said(c, getattr(row, c)) for c in columns if getattr(row, c) is not None), *(m for m in more if m)])

    def constant(self) -> str:
        """What all share: "All: QLoRA, 128 tokens."; "" where nothing is."""
        same = [c for c in self.seen if c not in ("model", *self.columns) and len(self.seen[c]) == 1]
        words = ", ".join(dict.fromkeys(said(c, self.seen[c][0]) for c in same))
        return f"All: {words}." if words else ""


def said(column: str, value: Any) -> str:
    """A value of a column in words."""
    if column == "seq_len":
        return f"{value} tokens"
    return _WORDS.get(value, str(value)) if column != "model" else str(value)


def family(sources: Sequence[Source], model: str) -> str | None:
    """The study's model beside which this one stands; None: the study had none of its kind."""
    return next(known.family for source in sources for known in source.study.models if known.name == model)


def beside(sources: Sequence[Source], rows: Rows, before: str, after: str = " on an A40.") -> str:
    """The study's models beside which these rows stand, between words about them; "" where it had none."""
    models = " and ".join(dict.fromkeys(REFERENCE[known] for _, r in rows if (known := family(sources, r.model))))
    return f"{before}{models}{after}" if models else ""


def precision(sources: Sequence[Source]) -> str:
    """What the steps compute in, as the settings say it ("" where they do not)."""
    found: dict[str, None] = {}
    for source in sources:
        for setting in source.study.config.get("settings", {}).values():
            training = setting["experiment"]["training"]
            mixed = training["compute_dtype"] != training["param_dtype"]
            kept = f"mixed precision: {training['compute_dtype']}, trained weights in {training['param_dtype']}"
            found[kept if mixed else training["compute_dtype"]] = None
    return f" Ours in {'; '.join(found)}." if found else ""


def rows_of(sources: Sequence[Source], experiment: str, *metrics: str) -> Rows:
    """Of an experiment; of these metrics only, where any are named."""
    return [(source, row) for source in sources for row in source.study.of(experiment) if not metrics or row.metric in metrics]


def grouped(rows: Rows, name: Callable[[Row], str]) -> dict[str, Rows]:
    """By their names, in the order in which these come."""
    found: dict[str, Rows] = {}
    for source, row in rows:
        found.setdefault(name(row), []).append((source, row))
    return found


def on(sources: Sequence[Source], source: Source) -> str:
    """Which folder's a line is, behind its name; "" where there is one."""
    return f", {source.label}" if len(sources) > 1 else ""


def metric(row: Row) -> str:
    """A row's metric and scope as words."""
    return ", ".join(part for part in (row.scope, row.metric.replace("_", " ")) if part)
