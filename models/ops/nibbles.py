"""Codes of 4 bits, two a byte: from a canonical form's order into a layout's rows and back, on the host. No jax."""

from __future__ import annotations

import numpy as np

_AT_ONCE = 1 << 18  # bytes of codes: what is repacked stays in a core's cache


def pack(codes: np.ndarray, matrix: tuple[int, ...], layout: str, *, low_first: bool = False, in_place: bool = False) -> np.ndarray:
    """uint8 [..., ceil(out·in/2)], two neighbours a byte (low_first: the first in the low nibble), as rows [..., out, ceil(in/2)] of a
    layout.

    An odd row ends in a nibble of its own; the last one's is the canonical form's own, so that `unpack` gives back every bit.
    """
    out, inner = matrix
    if inner % 4 == 0:
        rows = codes.reshape(*codes.shape[:-1], out, inner // 2)
        into = rows if in_place else np.empty_like(rows)
        if layout == "halves":
            return _halves(rows, into, low_first)
        return _swapped(rows, into) if low_first else rows
    weights = _nibbles(codes, low_first)
    rows = np.zeros((*codes.shape[:-1], out, inner + inner % 2), np.uint8)
    rows[..., :inner] = weights[..., : out * inner].reshape(*codes.shape[:-1], out, inner)
    if out * inner % 2:
        rows[..., -1, -1] = weights[..., -1]
    first, second = np.split(rows, 2, axis=-1) if layout == "halves" else (rows[..., 0::2], rows[..., 1::2])
    return (first << 4) | second


def unpack(rows: np.ndarray, matrix: tuple[int, ...], layout: str, *, low_first: bool = False) -> np.ndarray:
    """The inverse of `pack`."""
    out, inner = matrix
    leading = rows.shape[:-2]
    weights = np.concatenate([rows >> 4, rows & 15], axis=-1) if layout == "halves" else _nibbles(rows)
    flat = weights[..., :inner].reshape(*leading, out * inner)
    if out * inner % 2:
        flat = np.concatenate([flat, weights[..., -1, -1:]], axis=-1)
    first, second = flat[..., 0::2], flat[..., 1::2]
    return (second << 4) | first if low_first else (first << 4) | second


def _nibbles(codes: np.ndarray, low_first: bool = False) -> np.ndarray:
    both = [codes & 15, codes >> 4] if low_first else [codes >> 4, codes & 15]
    return np.stack(both, axis=-1).reshape(*codes.shape[:-1], -1)


def _swapped(rows: np.ndarray, into: np.ndarray) -> np.ndarray:
    """Both nibbles of every byte in the other's place, in `into`."""
    high = rows << 4
    np.right_shift(rows, 4, out=into)
    into |= high
    return into


def _halves(rows: np.ndarray, into: np.ndarray, low_first: bool) -> np.ndarray:
    """Rows of pairs [..., in/2] as halves, in `into`: bytes j and j + in/4 hold what goes into bytes 2j and 2j + 1."""
    source, target = (a.reshape(-1, rows.shape[-1]) for a in (rows, into))
    half, step = rows.shape[-1] // 2, max(1, _AT_ONCE // rows.shape[-1])
    words = [np.empty((step, half), "<u2") for _ in range(3)]  # once: new memory costs as much as the work
    for row in range(0, len(source), step):
        piece = source[row : row + step]
        first, second, moved = (w[: len(piece)] for w in words)
        first[...], second[...] = piece[:, :half], piece[:, half:]
        for word in (first, second):  # a byte's two weights, a byte each
            np.left_shift(word, 4 if low_first else 8, out=moved)
            if not low_first:
                word >>= 4
            word |= moved
            word &= 0x0F0F
        first <<= 4
        first |= second
        target[row : row + step] = first.view(np.uint8)
    return into
