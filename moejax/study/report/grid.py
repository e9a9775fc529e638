"""A table with one column per folder, one for the study's PyTorch reference, and one of their ratio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from moejax.study.report.compare import Source
from moejax.study.report.page import Group, Number, Table, Text, text
from moejax.study.report.quantities import digits

STUDY = "study: PyTorch, A40"
NOTHING: Text = ("–",)


@dataclass
class Grid:
    """Cells by group, line and column; groups and lines in the order in which they were first put."""

    sources: Sequence[Source]
    first: str
    cells: dict[str, dict[str, dict[int, Text]]] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)

    def put(self, group: str, line: str, source: Source | None, *numbers: Number, study: str = "") -> None:
        """source None: the study's, of this model of it, which the group's title then names. A second content of a cell is added."""
        if study:
            self.beside[group] = study
        column = len(self.sources) if source is None else source.index
        row = self.cells.setdefault(group, {}).setdefault(line, {})
        content = tuple(part for number in numbers for part in (" · ", number))[1:]
        row[column] = (*row[column], "; ", *content) if column in row else content

    def table(self, caption: str) -> Table:
        """Of one folder the last column is ours over the study's (of shares, where there are any), of two the second over the first."""
        count = len(self.sources)
        theirs = any(count in row for lines in self.cells.values() for row in lines.values())
        head = [self.first, *(s.label for s in self.sources), *([STUDY] if theirs else [])]
        ratio = "2nd / 1st" if count == 2 else "ours / study" if count == 1 and theirs else ""
        groups = []
        for title, lines in self.cells.items():
            rows = []
            for line, row in _with_bars(lines).items():
                cells = [row.get(i, NOTHING) for i in range(count + theirs)]
                if ratio:
                    cells.append(_ratio(cells[1], cells[0], 0) if count == 2 else _ratio(cells[0], cells[1], -1))
                rows.append((text(line), *cells))
            groups.append(Group(f"{title} (study: {self.beside[title]})" if title in self.beside else title, tuple(rows)))
        return Table(caption, (*head, *([ratio] if ratio else [])), tuple(groups))


def _with_bars(lines: dict[str, dict[int, Text]]) -> dict[str, dict[int, Text]]:
    """Bars are given as values: each becomes its share of the largest in its column."""
    largest: dict[int, float] = {}
    for row in lines.values():
        for column, cell in row.items():
            largest[column] = max(largest.get(column, 0.0), *(f.bar or 0.0 for f in cell if isinstance(f, Number)))

    def scaled(part: object, most: float) -> object:
        return replace(part, bar=part.bar / most if most else 0.0) if isinstance(part, Number) and part.bar is not None else part

    return {
        line: {column: tuple(scaled(f, largest[column]) for f in cell) for column, cell in row.items()}  # type: ignore[misc]
        for line, row in lines.items()
    }


def _ratio(over: Text, under: Text, which: int) -> Text:
    """Of two cells' first or last numbers, where each has one."""
    a, b = ([float(f.exact) for f in cell if isinstance(f, Number)][which:][:1] for cell in (over, under))
    return (Number(digits(a[0] / b[0]), repr(a[0] / b[0]), "derived"),) if a and b and b[0] else NOTHING
