"""The numbers of a process's steps, in memory: eight bytes each, so that a run of a million steps does not grow by gigabytes."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, overload


class History(Sequence[dict[str, Any]]):
    """One record per step, in order; all have the names of the first."""

    def __init__(self) -> None:
        self._columns: dict[str, array[Any]] = {}

    def append(self, record: Mapping[str, float]) -> None:
        if not self._columns:
            self._columns = {name: array("q" if isinstance(value, int) else "d") for name, value in record.items()}
        for name, column in self._columns.items():
            column.append(record[name])

    def __len__(self) -> int:
        return len(next(iter(self._columns.values()), ()))

    @overload
    def __getitem__(self, at: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, at: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, at: int | slice) -> Any:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        if not self._columns:
            raise IndexError(at)
        return {name: column[at] for name, column in self._columns.items()}
