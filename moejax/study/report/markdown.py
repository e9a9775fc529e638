"""The same page as Markdown; its figures are files beside it."""

from __future__ import annotations

import re

from moejax.study.report.page import (
    Block,
    Code,
    Commands,
    Figure,
    Fold,
    Fragment,
    Items,
    Link,
    Number,
    Page,
    Paragraph,
    Section,
    Table,
    Text,
)


def render(page: Page, figures: str) -> str:
    """figures: the folder of the figures' files, seen from the Markdown file."""
    parts = [f"# {_plain(page.title)}", *_blocks(page.lead, figures)]
    parts.append("\n".join(f"- [{_plain(s.title)}](#{s.anchor})" for s in page.sections))
    for section in page.sections:
        parts += _section(section, figures)
    return "\n\n".join(parts) + "\n"


def _section(section: Section, figures: str) -> list[str]:
    return [f'<a id="{section.anchor}"></a>\n\n## {_plain(section.title)}', *_blocks(section.blocks, figures)]


def _blocks(blocks: tuple[Block, ...], figures: str) -> list[str]:
    return [_block(b, figures) for b in blocks]


def _block(block: Block, figures: str) -> str:
    match block:
        case Paragraph(content, kind):
            return f"> **{_text(content)}**" if kind == "warning" else _text(content)
        case Items(items, ordered):
            return "\n".join(f"{f'{i}.' if ordered else '-'} {_text(item)}" for i, item in enumerate(items, 1))
        case Table():
            return _table(block)
        case Figure(name, title, _):
            return f"![{_plain(title)}]({figures}/{name}.svg)"
        case Commands(lines):
            return "\n".join(("```", *lines, "```"))
        case Fold(summary, blocks, _):
            return "\n\n".join((f"<details><summary>{_plain(summary)}</summary>", *_blocks(blocks, figures), "</details>"))


def _table(table: Table) -> str:
    lines = [_text(table.caption), "", _row([_plain(h) for h in table.head]), _row(["---", *["---:"] * (len(table.head) - 1)])]
    for group in table.groups:
        if any(group.title):
            lines.append(_row([f"**{_text(group.title)}**", *[""] * (len(table.head) - 1)]))
        lines += [_row([_text(cell) for cell in row]) for row in group.rows]
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _text(content: Text) -> str:
    return "".join(_fragment(f) for f in content)


def _fragment(fragment: Fragment) -> str:
    match fragment:
        case Number(text):
            return _plain(text)
        case Code(text):
            return f"`{text}`"
        case Link(text, anchor):
            return f"[{_plain(text)}](#{anchor})"
        case str():
            return _plain(fragment)


def _plain(text: str) -> str:
    """Text that Markdown must not read as its own."""
    return re.sub(r"([\\`*_<>\[\]#$])", r"\\\1", text)
