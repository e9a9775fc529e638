"""Write measured choices into the table that `auto` reads."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from moejax.models.ops import choice

ROOT = Path(__file__).parent.parent


def parsed(parser: argparse.ArgumentParser, dtype: str) -> argparse.Namespace:
    """The command line, with what every measurement takes. dtype: where it says none."""
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=dtype)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="a small shape, in seconds")
    parser.add_argument("--update", action="store_true", help="write the winners into the table; needs --out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.update and options.out is None:
        parser.error("--update needs --out: the table names the file with the seconds")
    return options


def update(operation: str, kind: str, entries: list[dict[str, Any]], source: Path) -> None:
    """An operation's entries of this kind of device and these shapes replaced, all others kept.

    source: the result file with the seconds; each entry names it.
    """
    source = source.resolve()
    measured = str(source.relative_to(ROOT) if source.is_relative_to(ROOT) else source.name)
    content, shape = json.loads(choice.FILE.read_text(encoding="utf-8")), choice.SHAPES[operation]
    table = content[operation]
    new = {tuple(e[n] for n in shape): e | {"measured": measured} for e in entries}
    kept = [e for e in table.get(kind, []) if tuple(e[n] for n in shape) not in new]
    table[kind] = sorted([*kept, *new.values()], key=lambda e: tuple(e[n] for n in shape))
    content[operation] = dict(sorted(table.items()))
    choice.FILE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
