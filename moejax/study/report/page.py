"""What a page is made of, before it is HTML or Markdown. Text is plain; numbers keep the exact figure that they round."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any, Literal

Source = Literal["ours", "study", "derived"]


@dataclass(frozen=True)
class Number:
    """A number on the page. `exact`: the result file's own string ("ours"), the study's published one, or what was computed from them.

    `text` is what a reader sees of it: rounded, with its unit. `place`: "folder:line" of an "ours", in the order of the folders, the
    line of its results.csv.
    """

    text: str
    exact: str
    source: Source = "ours"
    place: str = ""


@dataclass(frozen=True)
class Code:
    """A word or a line as one types it."""

    text: str


@dataclass(frozen=True)
class Link:
    """To a section of the page (by its anchor) or to a section of a page beside it."""

    text: str
    anchor: str


Fragment = str | Number | Code | Link
Text = tuple[Fragment, ...]


@dataclass(frozen=True)
class Paragraph:
    text: Text
    warning: bool = False


@dataclass(frozen=True)
class Items:
    """A list."""

    items: tuple[Text, ...]


@dataclass(frozen=True)
class Group:
    """Rows of a table under one heading ("": none). A row's first cell names it."""

    title: Text
    rows: tuple[tuple[Text, ...], ...]


@dataclass(frozen=True)
class Table:
    caption: Text
    head: tuple[str, ...]
    groups: tuple[Group, ...]

    @property
    def has_numbers(self) -> bool:
        """Or words alone."""
        return any(True for _ in numbers(self))


@dataclass(frozen=True)
class Figure:
    """`svg`: a whole <svg> element, fit to be put into HTML (see `svg.embed`). `name` is its file's name in a Markdown report."""

    name: str
    title: str
    svg: str


@dataclass(frozen=True)
class Commands:
    """Lines for a shell."""

    lines: tuple[str, ...]


@dataclass(frozen=True)
class Fold:
    """Blocks that a reader opens. Printed when open."""

    summary: str
    blocks: tuple[Block, ...]


Block = Paragraph | Items | Table | Figure | Commands | Fold


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

    @property
    def blocks(self) -> tuple[Block, ...]:
        return (*self.lead, *(block for section in self.sections for block in section.blocks))


def text(*fragments: Fragment) -> Text:
    return tuple(fragments)


def numbers(content: Any) -> Iterator[Number]:
    """Every number in blocks or whatever they are made of, in its order."""
    return (part for part in _parts(content) if isinstance(part, Number))


def figures(page: Page) -> list[Figure]:
    """Every figure on the page, in its order."""
    return [part for part in _parts(page) if isinstance(part, Figure)]


def _parts(content: Any) -> Iterator[Any]:
    """The content itself, and everything in it."""
    yield content
    for part in content if isinstance(content, tuple | list) else vars(content).values() if is_dataclass(content) else ():
        yield from _parts(part)
