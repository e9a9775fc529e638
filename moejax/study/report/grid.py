"""A table with one column per folder and one for the study's PyTorch reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from moejax.study.report.compare import Source
from moejax.study.report.page import Fold, Group, Number, Table, Text, text
from moejax.study.report.quantities import digits, rounded

STUDY = "study: PyTorch, A40"
NOTHING: Text = ("–",)


def published(value: float, unit: str = "") -> Number:
    """A number of the study's."""
    return Number(rounded(value, unit), repr(value), "study")


def derived(value: float, unit: str = "") -> Number:
    """A number computed from numbers on the page."""
    return Number(rounded(value, unit), repr(value), "derived")


@dataclass
class Grid:
    """Cells by group, line and column; groups and lines in the order in which they were first put.

    first: the head of the column of the lines' names. study: the head of the reference's column, which is there where it has a cell.
    """

    sources: Sequence[Source]
    first: str
    study: str | None = STUDY
    cells: dict[str, dict[str, dict[int, Text]]] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)

    def put(self, group: str, line: str, source: Source | None, content: Text, model: str | None = None) -> None:
        """source None: the study's, of this model, which the group's name then says. A second content of one cell is added to the first."""
        if model is not None:
            self.beside[group] = model
        column = len(self.sources) if source is None else source.index
        row = self.cells.setdefault(group, {}).setdefault(line, {})
        row[column] = (*row[column], "; ", *content) if column in row else content

    def folded(self, caption: str, figures: str = "this figure") -> Fold:
        """The table behind a figure, or several."""
        return Fold(f"The numbers of {figures}", (self.table(text(caption)),))

    def table(self, caption: Text) -> Table:
        theirs = any(len(self.sources) in row for lines in self.cells.values() for row in lines.values())
        study = [self.study] if self.study and theirs else []
        width = len(self.sources) + len(study)
        compared = len(self.sources) == 2
        head = [self.first, *(s.label for s in self.sources)]
        if compared:
            head.append("2nd / 1st")
        groups = []
        for title, lines in self.cells.items():
            rows = []
            for line, row in lines.items():
                cells = [row.get(i, NOTHING) for i in range(width)]
                if compared:
                    cells.insert(2, _ratio(cells[0], cells[1]))
                rows.append((text(line), *cells))
            model = f" (study: {self.beside[title]})" if title in self.beside else ""
            groups.append(Group(text(f"{title}{model}"), tuple(rows)))
        return Table(caption, (*head, *study), tuple(groups))


def _ratio(first: Text, second: Text) -> Text:
    """Of two cells' measured numbers, where each has one."""
    a, b = ([f for f in cell if isinstance(f, Number) and f.source == "ours"] for cell in (first, second))
    if len(a) != 1 or len(b) != 1 or float(a[0].exact) == 0:
        return NOTHING
    value = float(b[0].exact) / float(a[0].exact)
    return (Number(f"{digits(value)}", repr(value), "derived"),)
