"""Out of memory, in XLA's words of GPUs and TPUs: what was wanted, what there was, and how many rows would fit."""

from __future__ import annotations

import re
from collections.abc import Callable

from moejax.errors import UserError

_SIZE = r"(\d+(?:\.\d+)?) ?([KMGT]?)(?:iB|B| bytes|\b)"
_TEXTS = (
    rf"Used {_SIZE} of {_SIZE} hbm",  # a TPU's compiler
    rf"HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)",  # the same, where arguments are not even counted
    rf"Attempting to (?:allocate|reserve) {_SIZE}.*?There are {_SIZE} free",  # a TPU at run time
    rf"[Oo]ut of memory (?:while trying to allocate|allocating) {_SIZE}",  # a GPU, a CPU
    rf"Failed to allocate request for {_SIZE}",  # a GPU, for an array
)


class NoRoom(UserError):
    """The compiler refuses a program for the memory it would take. wanted, available: bytes. temporaries: that alone, where the compiler
    tells no more (`of_temporaries`): then arguments are in `wanted` as if none were ever given free."""

    def __init__(self, message: str, wanted: float, available: float, temporaries: float | None = None):
        super().__init__(message)
        self.wanted, self.available, self.temporaries = wanted, available, temporaries


def of_temporaries(text: str) -> bool:
    """Whether what `read` gives are temporaries alone."""
    return "HLO temporaries" in text


def read(text: str) -> tuple[float | None, float | None]:
    """(bytes that were wanted, bytes that were available) by an error of XLA's; None for what it does not say."""
    for pattern in _TEXTS:
        if found := re.search(pattern, text, re.DOTALL):
            pairs = zip(found.groups()[::2], found.groups()[1::2], strict=True)
            sizes = [float(number) * 1024.0 ** " KMGT".index(unit or " ") for number, unit in pairs]
            return sizes[0], sizes[1] if len(sizes) > 1 else None
    return None, None


def rows_within(peak_of: Callable[[int], float], rows: int, limit: float, multiple: int = 1) -> int:
    """The largest number of rows below `rows` whose peak is within `limit` bytes, a multiple of `multiple`; 0 where there is none.

    Peak memory is nearly affine in the rows: two peaks give it.
    """
    if rows <= multiple:
        return 0
    fewer = max(1, rows // multiple // 2) * multiple
    half = peak_of(fewer)
    slope = (peak_of(rows) - half) / (rows - fewer)
    return max(0, min(rows - 1, int((limit - (half - slope * fewer)) // slope))) // multiple * multiple if slope > 0 else 0
