"""Print progress events (moejax/progress.py): results to standard output, notes and bars to standard error."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal

from moejax.progress import Listener, Marked, Table, duration

QUIET_SECONDS = 5.0
WIDE = 110  # of tables where the output is no terminal
BRACKETS = ("\u27e6", "\u27e7")  # double square ones: a template's are single


class Shown(Listener):
    """On a terminal with spinners and bars that move; elsewhere in plain lines. rich is imported when there is something to show."""

    @cached_property
    def out(self) -> Any:
        from moejax.terminal import Console

        return Console(WIDE)

    @cached_property
    def beside(self) -> Any:
        from moejax.terminal import Console

        return Console(stderr=True)

    def say(self, told: str | Table | Marked) -> None:
        if isinstance(told, str):
            self.out.print(told, soft_wrap=True)
            return
        if isinstance(told, Marked):
            self._say_marked(told)
            return
        import rich.table

        table = rich.table.Table(title=told.title, title_justify="left", show_header=bool(told.columns))
        for place, column in enumerate(told.columns):
            table.add_column(column, justify="right" if place in told.right else "left")
        for row in told.rows:
            table.add_section() if row is None else table.add_row(*row)
        self.out.print(table)

    def _say_marked(self, told: Marked) -> None:
        """What stands out in colour on a terminal, in brackets elsewhere."""
        from rich.text import Text

        coloured = self.out.is_terminal and self.out.color_system is not None
        self.out.print(f"{told.title} ({'green' if coloured else ' … '.join(BRACKETS)}: trained on)", soft_wrap=True)
        text = Text()
        for part, marked in told.parts:
            if coloured:
                text.append(part, "bold green" if marked else "")
            else:
                text.append(part.join(BRACKETS) if marked else part)
        self.out.print(Text("\n").join([Text("  ") + line for line in text.split("\n")]), soft_wrap=True)

    def note(self, text: str) -> None:
        self.beside.print(text, soft_wrap=True)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """At once and with a spinner on a terminal; elsewhere a line when it takes longer than 5 s, and its end."""
        from rich.errors import LiveError
        from rich.markup import escape

        spinner = self.out.status(escape(what)) if self.out.is_terminal else None
        try:
            if spinner is not None:
                spinner.start()
        except LiveError:  # something else is moving there already
            spinner = None
        start, told = time.monotonic(), threading.Event()

        def tell() -> None:
            told.set()
            self.say(f"{what} …")

        timer = threading.Timer(QUIET_SECONDS, tell)
        timer.daemon = True
        if spinner is None:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()
            if spinner is not None:
                spinner.stop()
        if told.is_set():
            self.say(f"{what}: {time.monotonic() - start:.0f} s")

    @contextmanager
    def bar(self, what: str, total: int, unit: Literal["bytes", "layers"]) -> Iterator[Callable[[int], None]]:
        from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.progress import TransferSpeedColumn as Speed

        size = (DownloadColumn(), Speed()) if unit == "bytes" else (MofNCompleteColumn(), TextColumn(unit))
        columns = (TextColumn(what), BarColumn(), *size, TimeRemainingColumn())
        with Progress(*columns, console=self.beside, transient=True, disable=not self.beside.is_terminal) as moving:
            task = moving.add_task(what, total=total)
            yield lambda more: moving.advance(task, more)

    @contextmanager
    def steps(self, total: int, done: int) -> Iterator[Callable[[int, dict[str, Any]], None]]:
        """With loss, speed and time left; where the output is no terminal, some twenty lines."""
        begun, each = (done, math.nan), max(1, total // 20)  # step and time from which speed is counted: the first one compiles

        def text(record: dict[str, Any]) -> str:
            rates = f"{record['queries_per_second']:.2f} queries/s  {record['tokens_per_second']:.0f} tokens/s"
            return f"loss {record['loss']:.4f}  {rates}"

        def line(step: int, record: dict[str, Any]) -> None:
            nonlocal begun
            if step == done + 1:
                begun = step, time.monotonic()
            if step % each == 0 or step in (done + 1, total):
                made, since = step - begun[0], time.monotonic() - begun[1]
                left = duration(since / made * (total - step) if made else math.inf)
                rate = f"  lr {record['learning_rate']:.2e}" if "learning_rate" in record else ""  # not of a caller's own optimizer
                self.say(f"step {step}/{total}  {text(record)}{rate}  left {left}")

        if not self.out.is_terminal:
            yield line
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=self.out) as moving:
            task = moving.add_task("train", total=total, completed=done, text="compiling")
            yield lambda step, record: moving.update(task, completed=step, text=text(record))
