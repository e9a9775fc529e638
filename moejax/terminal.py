"""What is shown in a terminal: texts as they stand."""

from __future__ import annotations

from typing import Any

import rich.console

from moejax.streams import silence


class Console(rich.console.Console):
    """rich's console for texts, names and paths that others wrote: `[/b]` or `:apple:` in one of them is no markup, in tables neither.

    What is to be coloured is a `rich.text.Text`: rich's search for numbers and names takes hours in a text of a million letters.
    A reader that goes away (`| head`) ends nothing: the rest is done and not shown.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**({"markup": False, "emoji": False, "highlight": False} | settings))

    def on_broken_pipe(self) -> None:
        silence()
