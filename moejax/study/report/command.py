"""`moejax report`: one HTML page, and the same as Markdown, from one or several folders of `moejax characterize`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from moejax.errors import UserError
from moejax.files import replace_text


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("folders", nargs="+", metavar="DIR", help="output folder of `moejax characterize`; several are compared")
    parser.add_argument(
        "--out", default=None, metavar="FILE.html",
        help="output file (default: DIR/report.html, or comparison.html for several); FILE.md is written next to it",
    )
    return parser


def run(options: argparse.Namespace) -> int:
    """Write the page. Raises UserError for what is no such folder, and where nothing can be written."""
    from moejax.study.report import compare, document, render

    file = _target(options.folders, options.out)
    report = document.build(compare.load(options.folders))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file.with_suffix(".md"), render.markdown(report))
        replace_text(file, render.html(report))
    except OSError as error:
        raise UserError(f"{error.filename or file}: {error.strerror}: the report cannot be written; --out says where it goes") from None
    print(f"{file}\n{file.with_suffix('.md')}")
    return 0


def _target(folders: Sequence[str], out: str | None) -> Path:
    if len({Path(f).resolve() for f in folders}) < len(folders):
        raise UserError(f"{', '.join(folders)}: a folder is given twice: expected different ones to compare")
    if out is None:
        return Path(folders[0]) / "report.html" if len(folders) == 1 else Path("comparison.html")
    if Path(out).suffix != ".html":
        raise UserError(f"--out {out}: expected a file's name that ends in .html (Markdown is written alongside it)")
    return Path(out)
