"""The last two axes of an array on a TPU: memory has tiles of 8 x 128 numbers (of 1, 2 or 4 rows for as many), and both axes are filled up
to whole tiles. No jax."""

from __future__ import annotations

ROWS, LANES = 8, 128


def filled(rows: int, columns: int) -> int:
    """Numbers that [rows, columns] take the room of."""
    tile = rows if rows in (1, 2, 4) else ROWS
    return -(-rows // tile) * tile * -(-columns // LANES) * LANES


def folded(rows: int, columns: int) -> tuple[int, int]:
    """[rows, columns] reshaped such that the least is filled up: of rows that are no multiple of 8 several for each."""
    pieces = min((k for k in (1, 2, 4, 8) if columns % k == 0), key=lambda k: filled(rows * k, columns // k))
    return rows * pieces, columns // pieces


def in_sixteens(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[rows, columns] of bytes as arrays whose tiles have 8 rows; itself, where they have anyway."""
    rows, columns = shape
    return (rows // 16, 16, columns) if rows % 32 == 0 else shape


def dealt(rows: int, columns: int, count: int) -> int | None:
    """Which axis of [rows, columns], -2 or -1, to deal out to `count` devices, such that the least is filled up; None: they divide none."""
    found = {-2: filled(rows // count, columns)} if rows % count == 0 else {}
    found |= {-1: filled(rows, columns // count)} if columns % count == 0 else {}
    return min(found, key=lambda axis: found[axis], default=None)
