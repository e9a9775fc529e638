"""`estimate.py reproduce`: tables, JSON and figures."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from moejax.estimator.commands import draw, print_json, show_table
from moejax.study.cost import figures, reproduce


def run(options: argparse.Namespace) -> int:
    sections = [*reproduce.sections(), *([reproduce.form_scores()] if options.forms else [])]
    bars = reproduce.bars()
    if options.json:
        document: dict[str, Any] = {s.key: {"title": s.title, "rows": s.records(), "notes": s.notes} for s in sections}
        print_json(document | {"bars": dataclasses.asdict(bars) | {"met": bars.met}})
    else:
        for section in sections:
            show_table(section.title, section.columns, section.rows, section.notes)
        print("bars met" if bars.met else "bars NOT met")
    draw(options.plot, lambda _, folder: figures.reproduction(folder))
    return 0
