"""Files that are compressed: gzip, bzip2, xz and Zstandard, known by their first bytes."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable
from typing import NamedTuple

from moejax.errors import UserError, first_line

SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zstd")


class _Format(NamedTuple):
    name: str
    mark: bytes  # at the beginning of the file
    unpack: Callable[[bytes], bytes]


def _zstd(content: bytes) -> bytes:
    import pyarrow  # reads it, several frames too; Python does from 3.14

    return bytes(pyarrow.input_stream(pyarrow.BufferReader(content), compression="zstd").read())


_FORMATS = (
    _Format("gzip", b"\x1f\x8b", gzip.decompress),
    _Format("bzip2", b"BZh", bz2.decompress),
    _Format("xz", b"\xfd7zXZ\0", lzma.decompress),
    _Format("zstd", b"\x28\xb5\x2f\xfd", _zstd),
)


def unpacked(path: str, content: bytes) -> bytes:
    """The content, decompressed where it is compressed. Raises UserError where that fails, or nothing is in it."""
    for form in _FORMATS:
        if content.startswith(form.mark):
            try:
                content = form.unpack(content)
            except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
                raise UserError(f"{path}: compressed with {form.name}, and damaged or cut off ({first_line(error)})") from None
            if not content:
                raise UserError(f"{path} is empty, once it is unpacked ({form.name})")
            inner = next((other.name for other in _FORMATS if content.startswith(other.mark)), None)
            if inner is not None:
                raise UserError(f"{path} is compressed twice ({inner} in {form.name}): unpack it once")
            break
    return content


def form_of(start: bytes) -> str | None:
    """How a file that begins so is compressed; None: not at all."""
    return next((form.name for form in _FORMATS if start.startswith(form.mark)), None)


def bare(name: str) -> str:
    """A name without what says how it is compressed."""
    suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
    return name.removesuffix(suffix)
