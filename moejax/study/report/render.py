"""A page as one HTML file, and as Markdown: `page.html.j2` and `page.md.j2`."""

from __future__ import annotations

import re
from pathlib import Path

import jinja2

from moejax.study.report.page import Page


def html(page: Page) -> str:
    return _render("page.html.j2", page)


def markdown(page: Page) -> str:
    return _render("page.md.j2", page)


def _render(template: str, page: Page) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=lambda name: name is not None and ".html" in name,
        undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.tests["a"] = lambda value, name: type(value).__name__ == name
    environment.filters |= {"literal": _literal, "cell": _cell}
    return environment.get_template(template).render(page=page)


def _literal(text: str) -> str:
    """Text that Markdown must not read as its own."""
    return re.sub(r"([\\`*_<>\[\]#$])", r"\\\1", text)


def _cell(text: str) -> str:
    """One of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")
