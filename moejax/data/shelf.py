"""A list whose items lie on disk: for data larger than memory."""

from __future__ import annotations

import os
import pickle
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, overload

from moejax.errors import UserError

T = TypeVar("T")
_BYTES = 1 << 20  # written at once


class Shelf(Sequence[T]):
    """Items behind one another in a file without a name, in the folder for temporary files (TMPDIR), which goes with the process. In
    memory are 8 bytes an item.

    A slice is a shelf over the same file, to be read alone. Raises UserError where the disk is full, or TMPDIR no folder.
    """

    def __init__(self, items: Iterable[T] = ()):
        folder = os.environ.get("TMPDIR")
        if folder and not Path(folder).is_dir():  # `tempfile` would take another, which may lie in memory
            raise UserError(f"TMPDIR = {folder} is no folder, and data.streaming keeps records there: make it, or name another")
        self._file = tempfile.TemporaryFile(prefix="moejax-")  # noqa: SIM115 (closed with the last shelf over it)
        self._places, self._waiting, self._size = array("q", [0]), bytearray(), 0
        self.extend(items)

    def append(self, item: T) -> None:
        self._waiting += pickle.dumps(item, pickle.HIGHEST_PROTOCOL)
        self._places.append(self._size + len(self._waiting))
        if len(self._waiting) >= _BYTES:
            self._write()

    def extend(self, items: Iterable[T]) -> None:
        for item in items:
            self.append(item)

    def _write(self) -> None:
        try:
            self._file.seek(self._size)
            self._file.write(self._waiting)
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"{tempfile.gettempdir()}: data.streaming keeps records there, and it cannot be written ({error.strerror}): make room, or "
                "name a folder of another disk in the environment variable TMPDIR"
            ) from error
        self._size += len(self._waiting)
        self._waiting = bytearray()

    def __len__(self) -> int:
        return len(self._places) - 1

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Shelf[T]: ...
    def __getitem__(self, index: int | slice) -> T | Shelf[T]:
        if isinstance(index, slice):
            first, last, step = index.indices(len(self))
            assert step == 1, "a shelf is cut, not thinned"
            self._write()
            part: Shelf[T] = Shelf.__new__(Shelf)
            part._file, part._size, part._waiting = self._file, self._size, bytearray()
            part._places = self._places[first : max(first, last) + 1]
            return part
        at = index + len(self) if index < 0 else index
        if not 0 <= at < len(self):
            raise IndexError(index)
        return self._between(at, at + 1)[0]

    def __iter__(self) -> Iterator[T]:
        for first in range(0, len(self), 64):
            yield from self._between(first, min(first + 64, len(self)))

    def _between(self, first: int, last: int) -> list[T]:
        """Items from `first` to before `last`, read at once."""
        if self._waiting:
            self._write()
        begin, end = self._places[first], self._places[last]
        self._file.seek(begin)
        content = memoryview(self._file.read(end - begin))
        cuts = [place - begin for place in self._places[first : last + 1]]
        items: list[Any] = [pickle.loads(content[a:b]) for a, b in pairwise(cuts)]
        return items


def held(parts: Iterable[Iterable[T]], *, streaming: bool) -> list[Sequence[T]]:
    """Each part in a list; with data.streaming all of them on one shelf, which is one open file, and each a slice of it."""
    if not streaming:
        return [list(part) for part in parts]
    shelf, ends = Shelf[T](), [0]
    for part in parts:
        shelf.extend(part)
        ends.append(len(shelf))
    return [shelf[begin:end] for begin, end in pairwise(ends)]
