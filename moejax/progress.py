"""What the rooms report while they work. They print nothing: a command shows it (commands/shown.py); without a listener only warnings are
heard, as Python's own."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Table:
    """Texts in columns; a row of None is a line across. Without names of columns there is no head. right: columns of numbers."""

    rows: Sequence[Sequence[str] | None]
    columns: Sequence[str] = ()
    right: Sequence[int] = ()
    title: str | None = None


@dataclass(frozen=True)
class Marked:
    """A text in parts, each with whether it stands out (is trained on)."""

    title: str
    parts: Sequence[tuple[str, bool]]


class Listener:
    """Who hears it; this one, which a library has, shows nothing but warnings."""

    def say(self, told: str | Table | Marked) -> None:
        """A result."""

    def note(self, text: str) -> None:
        """What is said next to the results: warnings."""
        warnings.warn(text.removeprefix("warning: "), stacklevel=3)

    def waiting(self, what: str) -> AbstractContextManager[None]:
        """Around what may take a moment."""
        return nullcontext()

    def bar(self, what: str, total: int, unit: Literal["bytes", "layers"]) -> AbstractContextManager[Callable[[int], None]]:
        """Around what takes long; gives the function that is called with how much more is done."""
        return nullcontext(lambda more: None)

    def steps(self, total: int, done: int) -> AbstractContextManager[Callable[[int, dict[str, Any]], None]]:
        """Around a run's optimizer steps; gives the function that is called with a step and its record (as in metrics.jsonl)."""
        return nullcontext(lambda step, record: None)


_heard_by = [Listener()]


def listener() -> Listener:
    """Who hears it now."""
    return _heard_by[0]


def listen(listener: Listener) -> None:
    """From now on this one hears it."""
    _heard_by[0] = listener


def say(*told: str | Table | Marked) -> None:
    for one in told:
        _heard_by[0].say(one)


def note(*lines: str) -> None:
    for line in lines:
        _heard_by[0].note(line)


def waiting(what: str) -> AbstractContextManager[None]:
    return _heard_by[0].waiting(what)


def bar(what: str, total: int, unit: Literal["bytes", "layers"]) -> AbstractContextManager[Callable[[int], None]]:
    return _heard_by[0].bar(what, total, unit)


def steps(total: int, done: int) -> AbstractContextManager[Callable[[int, dict[str, Any]], None]]:
    return _heard_by[0].steps(total, done)


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
