"""What a page is made of, before it is HTML or Markdown. Text is plain; numbers keep the exact figure that they round."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any, Literal

Whose = Literal["ours", "study", "derived"]


@dataclass(frozen=True)
class Number:
    """A number on the page. `exact`: the result file's own string ("ours"), the study's published one, or what was computed from them.

    `text` is what a reader sees of it: rounded, with its unit. `place`: "folder:line" of an "ours", in the order of the folders, the
    line of its results.csv. bar: 0 to 1, how much of the cell is filled behind it; None: no bar.
    """

    text: str
    exact: str
    source: Whose = "ours"
    place: str = ""
    bar: float | None = None


@dataclass(frozen=True)
class Code:
    """A word or a line as one types it."""

    text: str


Text = tuple[str | Number | Code, ...]


@dataclass(frozen=True)
class Paragraph:
    text: Text
    warning: bool = False


@dataclass(frozen=True)
class Group:
    """Rows of a table under one heading ("": none). A row's first cell names it."""

    title: str
    rows: tuple[tuple[Text, ...], ...]


@dataclass(frozen=True)
class Table:
    caption: str
    head: tuple[str, ...]
    groups: tuple[Group, ...]

    @property
    def has_numbers(self) -> bool:
        """Or words alone."""
        return any(True for _ in numbers(self))


Block = Paragraph | Table


@dataclass(frozen=True)
class Section:
    title: str
    anchor: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    title: str
    lead: tuple[Block, ...]
    sections: tuple[Section, ...]


def text(*fragments: str | Number | Code) -> Text:
    return tuple(fragments)


def numbers(content: Any) -> Iterator[Number]:
    """Every number in blocks or whatever they are made of, in its order."""
    if isinstance(content, Number):
        yield content
    for part in content if isinstance(content, tuple | list) else vars(content).values() if is_dataclass(content) else ():
        yield from numbers(part)
