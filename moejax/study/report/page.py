"""What a page is made of, before it is HTML or Markdown. Text is plain; numbers keep the exact figure that they round."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

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
        return any(True for _ in numbers((self,)))


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


def numbers(blocks: Sequence[Block]) -> Iterator[Number]:
    """Every number in them, in its order."""
    for block in _unfolded(blocks):
        for fragments in _texts(block):
            yield from (f for f in fragments if isinstance(f, Number))


def figures(page: Page) -> list[Figure]:
    """Every figure on the page, in its order."""
    return [block for block in _unfolded(page.blocks) if isinstance(block, Figure)]


def _unfolded(blocks: Sequence[Block]) -> Iterator[Block]:
    for block in blocks:
        if isinstance(block, Fold):
            yield from _unfolded(block.blocks)
        else:
            yield block


def _texts(block: Block) -> Iterator[Text]:
    if isinstance(block, Paragraph):
        yield block.text
    elif isinstance(block, Items):
        yield from block.items
    elif isinstance(block, Table):
        yield block.caption
        for group in block.groups:
            yield group.title
            for row in group.rows:
                yield from row
