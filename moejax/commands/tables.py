"""Output shared by commands: tables with notes, JSON, figures."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from moejax.estimator.units import Gigabytes


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, Gigabytes):
        return f"{value}"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}" if abs(value) >= 100 else f"{value:.3f}"
    return str(value)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], notes: Sequence[str]) -> None:
    from rich.table import Table

    from moejax.terminal import Console

    console = Console(width=None if sys.stdout.isatty() else 150)
    table = Table(title=title, title_justify="left")
    numbers = [all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(columns))]
    for place, (column, number) in enumerate(zip(columns, numbers, strict=True)):
        table.add_column(column, justify="right" if number else "left", no_wrap=place == 0)
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    console.print(table)
    for note in notes:
        console.print(f"  {note}")
    console.print()


def said_once(notes: Iterable[tuple[str, str]]) -> list[str]:
    """`A40, H100: NOTE`, of (GPU, note): what is the same of several is said once."""
    by_note: dict[str, list[str]] = defaultdict(list)
    for gpu, note in notes:
        by_note[note].append(gpu)
    return [f"{', '.join(gpus)}: {note}" for note, gpus in by_note.items()]


def print_json(document: Any) -> None:
    print(json.dumps(document, indent=1, default=float))


def draw(plot: str | None, which: Callable[[Any, Path], Sequence[Path]]) -> None:
    """Draw by estimator/figures.py into --plot's folder, if asked, and say where (on stderr: stdout may be JSON)."""
    if not plot:
        return
    from moejax.estimator import figures

    folder = Path(plot)
    folder.mkdir(parents=True, exist_ok=True)
    for path in which(figures, folder):
        print(f"drawn: {path}", file=sys.stderr)
