"""safetensors files, a tensor at a time in both directions: no whole file is ever in memory."""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from moejax.errors import UserError
from moejax.files import aside, lfs_pointer, settle

_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16), "F64": np.dtype(np.float64),
    "U8": np.dtype(np.uint8), "I8": np.dtype(np.int8), "I32": np.dtype(np.int32), "I64": np.dtype(np.int64), "BOOL": np.dtype(np.bool_),
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


_PIECE = 1 << 24  # bytes asked for at once


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array of any numbers at an address that is a multiple of 64: on a CPU jax takes it as it is."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    # Not numpy's own memory: it asks for huge pages, which the kernel may spend seconds a gigabyte on making next to a full page cache.
    memory = np.frombuffer(mmap.mmap(-1, max(size, 1)), np.uint8)
    return memory[:size].view(dtype).reshape(shape)


class Staging:
    """Two pieces of memory, lent in turn: a reader fills one while the other is used. New memory would cost as much as reading does."""

    def __init__(self) -> None:
        self._memory, self._next = [aligned((0,), np.uint8)] * 2, 0

    def lend(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array of any numbers, at an address that is a multiple of 64; the last but one that was lent is taken back."""
        size, self._next = math.prod(shape) * np.dtype(dtype).itemsize, 1 - self._next
        if self._memory[self._next].size < size:
            self._memory[self._next] = aligned((size,), np.uint8)
        return self._memory[self._next][:size].view(dtype).reshape(shape)


class Reader:
    """The tensors of one file, read into memory when they are asked for. Raises UserError where the file is not whole."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})") from None
        try:
            safe_open(str(path), framework="numpy").__exit__(None, None, None)  # the library judges header, sizes and offsets
        except (SafetensorError, OSError) as error:
            what = lfs_pointer(path) or f"is no whole safetensors file ({error}): download it again"
            raise UserError(f"{path} {what}") from None
        length = int.from_bytes(self._file.read(8), "little")
        self._start = 8 + length
        self._entries: dict[str, Any] = json.loads(self._file.read(length))
        self.metadata: dict[str, str] = self._entries.pop("__metadata__", {})

    def close(self) -> None:
        """Of a file that is deleted: what it takes is free only then."""
        self._file.close()

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name]["shape"])

    def dtype(self, name: str) -> np.dtype[Any]:
        kind = self._entries[name]["dtype"]
        if kind not in _DTYPES:
            raise UserError(f"{self.path}: tensor {name!r} is {kind}: expected one of {', '.join(_DTYPES)}")
        return _DTYPES[kind]

    def read(self, name: str, into: np.ndarray | None = None, first: int = 0) -> np.ndarray:
        """A tensor, or as many of its numbers from the `first` on as `into` holds, in that memory.

        In large pieces, and never by a map of the file: an array that is a view of it would change with the file. Raises UserError where
        the file cannot be read.
        """
        array = aligned(self.shape(name), self.dtype(name)) if into is None else into
        offset = self._start + self._entries[name]["data_offsets"][0] + first * array.itemsize
        rest = array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")
        try:
            while rest:
                count = os.preadv(self._file.fileno(), [rest[:_PIECE]], offset)
                if not count:
                    raise OSError(f"it ends {len(rest)} bytes early")
                rest, offset = rest[count:], offset + count
        except OSError as error:
            raise UserError(f"{self.path}: tensor {name!r} cannot be read ({error}): download it again") from None
        return array


SUMS = "crc32"
_DIGITS = 8  # of a CRC-32 in hexadecimal


class Summed(Reader):
    """A file that holds the CRC-32 of its tensors, in their order: in its metadata (SUMS: 8 digits each), or where these say so (`sums:
    crc32`) in a tensor SUMS; else any file. Reading a tensor whole raises UserError where it is not what was written."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._sums: dict[str, int] = {}
        values: list[int] = []
        if self.metadata.get("sums") == SUMS and SUMS in self._entries:
            values = super().read(SUMS).tolist()
            del self._entries[SUMS]
        elif re.fullmatch(r"([0-9a-f]{8})+", self.metadata.get(SUMS, "")):
            digits = self.metadata[SUMS]
            values = [int(digits[i : i + _DIGITS], 16) for i in range(0, len(digits), _DIGITS)]
        if len(values) == len(self._entries):
            self._sums = dict(zip(self._entries, values, strict=True))

    def read(self, name: str, into: np.ndarray | None = None, first: int = 0) -> np.ndarray:
        array = super().read(name, into, first)
        if array.size == math.prod(self.shape(name)):
            self.check(name, array)
        return array

    def check(self, name: str, array: np.ndarray) -> None:
        """Raises UserError where a whole tensor that was read is not what was written."""
        if name in self._sums and _crc(array) != self._sums[name]:
            raise UserError(
                f"{self.path}: tensor {name!r} is not what was written there: remove this file, and start again; of an adapter or an "
                "export, copy or write it again"
            )


def _crc(array: np.ndarray, before: int = 0) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, before)


def write_file(
    path: Path, tensors: Mapping[str, np.ndarray], check: Callable[[Path], None] | None = None, metadata: Mapping[str, str] | None = None
) -> None:
    """Arrays as one file, with the rights that the umask gives. check: as `Writer`'s. metadata: besides the format. Raises
    UserError where it cannot be written."""
    shapes = {name: (value.shape, value.dtype) for name, value in tensors.items()}
    with Writer(path, shapes, {"format": "pt"} | dict(metadata or {}), check, sums=True) as writer:
        for name, value in tensors.items():
            writer.write(name, value)


class Writer:
    """One file of tensors whose shapes are known before their values; written aside and renamed when it is whole.

    Used as a context: leaving it by an exception (also a full disk's) leaves no file. check: called with the whole file before it is
    renamed; what it raises leaves the old file. sums: the metadata get the CRC-32 of each tensor, which is then written from its begin to
    its end.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[tuple[int, ...], Any]],
        metadata: Mapping[str, str],
        check: Callable[[Path], None] | None = None,
        sums: bool = False,
    ):
        self._path, self._aside, self._check = path, aside(path), check
        self._sums = dict.fromkeys(tensors, 0) if sums and tensors else {}
        header: dict[str, Any] = {"__metadata__": dict(metadata) | ({SUMS: self._digits()} if self._sums else {})}
        end = 0
        for name, (shape, dtype) in tensors.items():
            begin, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
            header[name] = {"dtype": _NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [begin, end]}
        self._entries = header
        encoded = self._header()
        self._start = 8 + len(encoded)
        self._left = end
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._aside.open("wb")
            try:
                self._file.write(len(encoded).to_bytes(8, "little") + encoded)
            except OSError:  # nobody will leave this context: it is not entered
                with suppress(OSError):
                    self._file.close()
                self._aside.unlink()
                raise
        except OSError as error:
            raise self._failed(error) from None

    def write(self, name: str, value: Any, start: int = 0) -> None:
        """Put `value` into tensor `name`, from its `start`-th byte on."""
        data = np.ascontiguousarray(value)
        try:
            self._file.seek(self._start + self._entries[name]["data_offsets"][0] + start)
            self._file.write(data.reshape(-1).view(np.uint8).data)
        except OSError as error:
            raise self._failed(error) from None
        self._left -= data.nbytes
        if self._sums:
            self._sums[name] = _crc(data, self._sums[name] if start else 0)

    def _digits(self) -> str:
        return "".join(f"{value:0{_DIGITS}x}" for value in self._sums.values())

    def _header(self) -> bytes:
        encoded = json.dumps(self._entries).encode()
        return encoded + b" " * (-len(encoded) % 64 + 56)  # data on a multiple of 64 bytes: a view of it is aligned for every dtype

    def _failed(self, error: OSError) -> UserError:
        return UserError(f"{self._path} cannot be written ({error.strerror}): nothing was left there; free space or choose another folder")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        try:
            try:
                if kind is None and self._sums:  # known now, and as long as what stood there
                    self._entries["__metadata__"][SUMS] = self._digits()
                    self._file.seek(8)
                    self._file.write(self._header())
                self._file.close()
                if kind is None:
                    if self._left:
                        raise ValueError(f"{self._path}: {self._left} bytes were never written")
                    if self._check is not None:
                        self._check(self._aside)
                    settle(self._aside, self._path)
            except OSError as error:
                raise self._failed(error) from None
        finally:
            self._aside.unlink(missing_ok=True)
