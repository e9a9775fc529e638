"""`estimate.py reproduce`: tables, JSON and figures."""

from __future__ import annotations

import argparse
from typing import Any

from moejax.commands.tables import draw, print_json, show_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument("--plot", metavar="DIR", help="folder for PNG figures")


def run(options: argparse.Namespace) -> int:
    from moejax.study.cost import reproduce

    sections = reproduce.sections()
    bars = reproduce.bars(next(s for s in sections if s.key == "our_model").records())
    if options.json:
        document: dict[str, Any] = {s.key: {"title": s.title, "rows": s.records(), "notes": s.notes} for s in sections}
        print_json(document | {"bars": bars})
    else:
        for section in sections:
            show_table(section.title, section.columns, section.rows, section.notes)
        print("bars met" if bars["met"] else "bars NOT met")
    if options.plot:
        from moejax.study.cost import figures

        draw(options.plot, lambda _, folder: figures.reproduction(folder))
    return 0
