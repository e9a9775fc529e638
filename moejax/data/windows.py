"""A file's records a window at a time, for files larger than memory."""

from __future__ import annotations

import codecs
import io
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from moejax.data import compression, parsing
from moejax.errors import UserError

BYTES = 1 << 24
"""Of a text file that are read at once."""


def windows(path: str) -> Iterator[list[Any]]:
    """The records of a file, as `parsing.parse` reads them, in order, a list for each window. Raises UserError as it does, and for a file
    that can only be read whole: a JSON list, UTF-16, a table that is compressed."""
    with Path(path).open("rb") as raw:
        start = raw.read(16)
        form = compression.form_of(start)
        raw.seek(0)
        if form is None and start.startswith(parsing.TABLES):
            import pyarrow

            yield from parsing.tables(path, pyarrow.memory_map(path), start)
        elif form is None:
            yield from _of_text(path, raw)
        else:
            with form.unpacking(path):
                yield from _of_text(path, form.open(raw))


def _of_text(path: str, file: BinaryIO) -> Iterator[list[Any]]:
    head = _filled(file, b"")
    if head.startswith(parsing.TABLES) or compression.form_of(head):
        raise UserError(f"{path}: data.streaming reads no table and no archive inside of a compressed file: unpack it")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or head[:2].count(0) == 1:
        raise UserError(f"{path} is UTF-16, which data.streaming does not read: save it as UTF-8")
    text = head[:4096].decode("utf-8-sig", "ignore").lstrip(" \t\r\n\f\v\ufeff")
    if parsing.is_table(path, text):
        yield from _rows(path, head, file)
    elif text.startswith("{"):
        yield from _objects(path, head, file)
    else:
        if text.startswith("["):
            raise UserError(
                f"{path} is one JSON list, which can only be read whole: write an object a line (.jsonl), or leave data.streaming out"
            )
        parsing.parse(path, head)  # which says what it is
        raise UserError(f"{path}: expected an object a line, a table, Parquet or Arrow")


def _filled(file: BinaryIO, before: bytes) -> bytes:
    """What was left before, and a window more: less of it at the end of the file alone."""
    parts, size = [before], 0
    while size < BYTES and (piece := file.read(BYTES - size)):
        parts.append(bytes(piece))
        size += len(piece)
    return b"".join(parts)


def _pieces(path: str, window: bytes, file: BinaryIO, border: bytes) -> Iterator[tuple[bytes, bool]]:
    """What was read and the rest, in pieces that end behind a line break with which a `border` begins; whether each is the last. Raises
    UserError where there is none for too long."""
    while True:
        more = file.read(1)
        cut = len(window) if not more else window.rfind(border) + 1
        if cut:
            yield window[:cut], not more
        if not more:
            return
        if len(window) - cut > compression.LARGEST:
            raise UserError(f"{path}: a record of more than {compression.LARGEST:,} bytes: expected an object a line, or a table")
        window = _filled(file, window[cut:] + more)


def _objects(path: str, head: bytes, file: BinaryIO) -> Iterator[list[Any]]:
    """Pieces that end before a line that begins with an object: no object is cut there."""
    line, count = 0, 0
    for piece, last in _pieces(path, head, file, b"\n{"):
        try:
            records = parsing.objects(path, piece, last=last, count=count)
        except UserError as error:
            raise _further(error, line) from None
        count += len(records)
        yield records
        line += piece.count(b"\n")


def _further(error: UserError, lines: int) -> UserError:
    """The same of a piece of a file behind this many lines."""
    return UserError(re.sub(r"(?<=, line )\d+", lambda found: str(int(found[0]) + lines), str(error), count=1))


def _rows(path: str, head: bytes, file: BinaryIO) -> Iterator[list[Any]]:
    pieces = _pieces(path, head.removeprefix(codecs.BOM_UTF8), file, b"\n")
    text = itertools.chain.from_iterable(io.StringIO(piece.decode(), newline="") for piece, _ in pieces)
    lines = itertools.dropwhile(lambda line: not line.strip(" \t\r\n\f\v\ufeff"), text)
    try:
        rows = parsing.rows(path, lines)
        while window := list(itertools.islice(rows, parsing.ROWS)):
            yield window
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}): iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW, if it is of Windows") from None
