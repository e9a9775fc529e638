"""What is shown in a terminal: texts as they stand."""

from __future__ import annotations

import os
import sys
from typing import Any

import rich.console
from rich.table import Table

from moejax.streams import silence


class Console(rich.console.Console):
    """rich's console for texts, names and paths that others wrote: `[/b]` or `:apple:` in one of them is no markup, in tables neither.

    What is to be coloured is a `rich.text.Text`: rich's search for numbers and names takes hours in a text of a million letters.
    A reader that goes away (`| head`) ends nothing: the rest is done and not shown. wide: characters of a line where standard output is no
    terminal, and COLUMNS does not say.
    """

    def __init__(self, wide: int | None = None, **settings: Any) -> None:
        width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else wide
        super().__init__(**({"markup": False, "emoji": False, "highlight": False, "width": width} | settings))

    def on_broken_pipe(self) -> None:
        silence()


def figures(*columns: str, title: str | None = None) -> Table:
    """An empty table of what the first column names and the others count."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=number > 0)
    return table
