"""Write measured choices into a table of models/ops that `auto` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def update(table: Path, shape: tuple[str, ...], kind: str, entries: list[dict[str, Any]], source: Path) -> None:
    """The entries of this kind of device and these shapes (the values under the names in `shape`) replaced, all others kept.

    source: the result file with the seconds; each entry names it.
    """
    source = source.resolve()
    measured = str(source.relative_to(ROOT) if source.is_relative_to(ROOT) else source.name)
    content = json.loads(table.read_text(encoding="utf-8"))
    new = {tuple(e[n] for n in shape): e | {"measured": measured} for e in entries}
    kept = [e for e in content.get(kind, []) if tuple(e[n] for n in shape) not in new]
    content[kind] = sorted([*kept, *new.values()], key=lambda e: tuple(e[n] for n in shape))
    table.write_text(json.dumps(dict(sorted(content.items())), indent=1) + "\n", encoding="utf-8")
