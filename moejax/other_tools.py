"""What other tools call the same settings (other_tools.yaml), for messages alone."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import yaml


@cache
def ours_by_theirs() -> dict[str, dict[str, str]]:
    """ "keys" and "values": theirs -> ours."""
    table = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return {kind: {their: our for our, theirs in names.items() for their in theirs} for kind, names in table.items()}


def ours(name: str) -> str | None:
    """What a key of another tool's is called here, or what to say instead."""
    return ours_by_theirs()["keys"].get(name.strip("-").lower().replace("-", "_"))


def nearest_value(value: Any, expected: Iterable[str]) -> str | None:
    """The one of the expected words that is meant, if one is near."""
    expected, word = list(expected), str(value).strip().lower().replace("-", "_")
    if (known := ours_by_theirs()["values"].get(word)) in expected:
        return known
    begun = [e for e in expected if word.startswith(e) or (len(word) > 1 and e.startswith(word))]
    close = begun or difflib.get_close_matches(word, expected, n=1, cutoff=0.5)
    return max(close, key=len) if close else None
