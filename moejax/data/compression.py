"""Files that are compressed: gzip, bzip2, xz and Zstandard, known by their first bytes."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

from moejax.errors import UserError, first_line

LARGEST, _RATIO = 1 << 30, 100
"""Bytes that any file may unpack to, and a record may have; more than that, and than _RATIO times the file's own size, is refused."""
SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zstd")


class Format(NamedTuple):
    """How a file may be compressed. mark: at its beginning; open: reads a file that is."""

    name: str
    mark: bytes
    open: Callable[[BinaryIO], Any]

    @contextmanager
    def unpacking(self, path: str) -> Iterator[None]:
        """Around what reads it: a file that is damaged is a UserError."""
        try:
            yield
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            raise UserError(f"{path}: compressed with {self.name}, and damaged or cut off ({first_line(error)})") from None


def _zstd(file: BinaryIO) -> Any:
    import pyarrow  # reads it, several frames too; Python does from 3.14

    return pyarrow.input_stream(file, compression="zstd")


_FORMATS = (
    Format("gzip", b"\x1f\x8b", lambda file: gzip.GzipFile(fileobj=file)),
    Format("bzip2", b"BZh", bz2.BZ2File),
    Format("xz", b"\xfd7zXZ\0", lzma.LZMAFile),
    Format("zstd", b"\x28\xb5\x2f\xfd", _zstd),
)


def unpacked(path: str, content: bytes) -> bytes:
    """The content, decompressed where it is compressed. Raises UserError where that fails, or nothing is in it."""
    form = form_of(content)
    if form is None:
        return content
    limit = max(LARGEST, _RATIO * len(content))
    with form.unpacking(path):
        content = bytes(form.open(io.BytesIO(content)).read(limit + 1))
    if len(content) > limit:
        raise UserError(
            f"{path} ({form.name}) unpacks to more than {limit:,} bytes, over {_RATIO} times its own size, which could fill the memory: "
            "unpack it yourself if it is right"
        )
    if not content:
        raise UserError(f"{path} is empty, once it is unpacked ({form.name})")
    if inner := form_of(content):
        raise UserError(f"{path} is compressed twice ({inner.name} in {form.name}): unpack it once")
    return content


def form_of(start: bytes) -> Format | None:
    """How a file that begins so is compressed; None: not at all."""
    return next((form for form in _FORMATS if start.startswith(form.mark)), None)


def bare(name: str) -> str:
    """A name without what says how it is compressed."""
    suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
    return name.removesuffix(suffix)
