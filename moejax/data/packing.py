"""Several queries in a row: best fit inside a shuffled window."""

from __future__ import annotations

import bisect
from collections.abc import Sequence


def pack(lengths: Sequence[int], row_tokens: int, window: int = 2048) -> list[list[int]]:
    """Indices of `lengths` for each row, every query whole, in rows of at most `row_tokens`.

    Inside a window of queries (in the order given, so that rows stay as random as the shuffle) the longest go first, each into the
    fullest open row that still has room: best-fit decreasing. Rows that a window leaves open stay open for the next.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room left, row), sorted
    for start in range(0, len(lengths), window):
        for index in sorted(range(start, min(start + window, len(lengths))), key=lambda i: (-lengths[i], i)):
            need = lengths[index]
            at = bisect.bisect_left(open_rows, (need, -1))
            if at == len(open_rows):
                rows.append([])
                room, row = row_tokens, len(rows) - 1
            else:
                room, row = open_rows.pop(at)
            rows[row].append(index)
            bisect.insort(open_rows, (room - need, row))
    return rows
