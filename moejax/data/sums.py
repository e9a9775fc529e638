"""Counts of several files or sources, added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from itertools import chain
from typing import Any, TypeVar

from moejax.data.shelf import Shelf

T = TypeVar("T")


def added(parts: Sequence[T]) -> T:
    """One dataclass of several of a kind: numbers are added, lists joined in order, lists in dictionaries likewise, dataclasses in them
    added; of all else the first that is something."""
    first = parts[0]
    assert is_dataclass(first) and not isinstance(first, type)
    return type(first)(**{one.name: _sum([getattr(part, one.name) for part in parts]) for one in fields(first)})


def _sum(values: Sequence[Any]) -> Any:
    there = [value for value in values if value]
    first = there[0] if there else values[0]
    if is_dataclass(first):
        return added(there)
    if isinstance(first, dict):
        keys = dict.fromkeys(key for value in there for key in value)
        return {key: _sum([value[key] for value in there if key in value]) for key in keys}
    if isinstance(first, list):
        return [item for value in there for item in value]
    if isinstance(first, Shelf):
        return first if len(there) == 1 else Shelf(chain.from_iterable(there))
    if isinstance(first, int) and not isinstance(first, bool):
        return sum(values)
    return first
