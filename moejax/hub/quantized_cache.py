"""Frozen weights on disk in the form of `moejax.models.ops.quantized`: the second start reads a quarter of the bytes, and quantizes none.

A file is found by what it was made from: the checkpoint's files (size, time of change, header, and samples of the data), our storage
format, and every variable's shape and dtype. What another version wrote has another name, and is made again.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from moejax import __version__
from moejax.errors import UserError
from moejax.hub.buffers import Buffer
from moejax.hub.safetensors_file import Reader, Staging, Writer, aligned
from moejax.models.ops.quantized import QuantizedTensor, stored_parts
from moejax.models.ops.split import joined, pieces_of, whole
from moejax.progress import note

T = TypeVar("T")

FORMAT = 3  # raise it when codes, scales or names change
_SAMPLES, _SAMPLE_BYTES = 64, 65536


def leaves_of(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> abstract array of what is kept of (abstract) variables: a quantized one is several, NAME.PART."""
    found = {name: stored_parts(whole(value)) for name, value in sorted(variables.items())}
    return {part_name(name, part): leaf for name, parts in found.items() for part, leaf in parts.items()}


def part_name(name: str, part: str) -> str:
    return f"{name}.{part}" if part else name


def key(files: list[Path], leaves: dict[str, Any], settings: str) -> str:
    """Hexadecimal name of the cache of these files, stored as `leaves` (name -> abstract array)."""
    digest = hashlib.sha256(f"{FORMAT} {__version__} {settings}".encode())
    digest.update(json.dumps({name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in leaves.items()}).encode())
    for path in sorted(files):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            for sample in range(_SAMPLES):
                file.seek(stat.st_size * sample // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]


class Content:
    """SHA-256 of a model's tensors as they are stored, in whatever order they come. `value`: in hexadecimal, once all are there.

    sums: name -> CRC-32 of its bytes, where its parts came in order. `put` returns at once; `wait` before the memory of what was put
    changes.
    """

    def __init__(self) -> None:
        self.value: str | None = None
        self.sums: dict[str, int] = {}
        self._parts: dict[str, str] = {}
        self._pending: list[tuple[str, Future[str]]] = []
        self._pool = ThreadPoolExecutor(1)

    def put(self, name: str, array: np.ndarray, index: tuple[int, ...]) -> None:
        data = _bytes(array)
        kind = f"{name} {list(index)} {array.dtype} {list(array.shape)}"
        self._pending.append((kind, self._pool.submit(self._hashed, name, data)))

    def _hashed(self, name: str, data: memoryview) -> str:
        self.sums[name] = zlib.crc32(data, self.sums.get(name, 0))
        return hashlib.sha256(data).hexdigest()

    def wait(self) -> None:
        self._parts |= {kind: digest.result() for kind, digest in self._pending}
        self._pending.clear()

    def finish(self) -> str:
        """The hash of all that was put."""
        self.wait()
        self._pool.shutdown()
        self.value = hashlib.sha256(json.dumps(sorted(self._parts.items())).encode()).hexdigest()
        return self.value


_CONTENT = "content_sha256"  # a tensor of its own: what the other tensors hash to, as they were streamed
_SUMS = "crc32"  # another one: of each tensor, in their order


def read(path: Path, variables: Mapping[str, Any], content: Content | None = None) -> dict[str, Any] | None:
    """The values of (abstract) variables from a cache, and into `content` the hash that is kept with them.

    None where there is none, or it is not what was asked for or (which is reported) not what was written: it is then made again."""
    if not path.is_file():
        return None
    try:
        reader = Reader(path)
    except UserError:
        return None
    leaves = leaves_of(variables)
    if set(reader.names()) != {*leaves, _CONTENT, _SUMS} or any(reader.shape(name) != tuple(leaf.shape) for name, leaf in leaves.items()):
        return None
    values: dict[str, Any] = {}
    sums: dict[str, int] = {}
    staging = Staging()
    with ThreadPoolExecutor(1) as pool:
        for name, variable in variables.items():
            pieces = list(pieces_of(variable))
            arrays: list[dict[str, jax.Array]] = [{} for _ in pieces]
            for part in stored_parts(pieces[0][1]):
                sum_ = 0
                for (first, piece), found in zip(pieces, arrays, strict=True):
                    found[part], sum_ = _held(reader, name, piece, part, pool, staging, first, sum_)
                sums[part_name(name, part)] = sum_
            values[name] = joined(
                piece.with_parts(found) if isinstance(piece, QuantizedTensor) else found[""]
                for (_, piece), found in zip(pieces, arrays, strict=True)
            )
    changed = [name for name, sum_ in zip(leaves, reader.read(_SUMS).tolist(), strict=True) if sums[name] != sum_]
    if changed:
        note(f"warning: {path}: {changed[0]} is not what was written there; it is made anew from the checkpoint")
        return None
    if content is not None:
        content.value = reader.read(_CONTENT).tobytes().hex()
    return values


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _held(
    reader: Reader, name: str, variable: Any, part: str, pool: ThreadPoolExecutor, staging: Staging, first: int, sum_: int
) -> tuple[jax.Array, int]:  # fmt: skip
    """A part of a variable, or of its layers from the `first` on, in memory's form, and the CRC-32 of what the file holds of it behind what
    `sum_` is of. Each piece is packed, or put into its place, while the next one is read."""
    stored, held = stored_parts(variable)[part], variable.parts()[part] if part else variable
    shape, dtype = stored.shape or (1,), np.dtype(stored.dtype)
    buffer, limit = Buffer(held), _at_once_bytes()
    in_place = part != "codes" or variable.matrix[1] % 4 == 0
    at_once = aligned(shape, dtype) if buffer.whole and (math.prod(shape) * dtype.itemsize <= limit or len(shape) == 1) else None
    numbers = int(min(limit, _PIECE_BYTES)) // dtype.itemsize
    pieces = [((), shape)] if at_once is not None and not in_place else list(_pieces(shape, numbers))

    def reading(at: tuple[int, ...], piece: tuple[int, ...]) -> Callable[[], np.ndarray]:
        start = int(np.ravel_multi_index(at, shape[: len(at)])) * math.prod(shape[len(at) :]) if at else 0
        into = staging.lend(piece, dtype) if at_once is None else at_once.reshape(-1)[start : start + math.prod(piece)].reshape(piece)
        return partial(reader.read, part_name(name, part), into, first * math.prod(shape[1:]) + start)

    packed: Any = None
    for (at, _), piece in zip(pieces, ahead(pool, (reading(*each) for each in pieces)), strict=True):
        sum_ = zlib.crc32(_bytes(piece), sum_)
        packed = variable.pack(part, piece, in_place=True) if part else piece
        if at_once is None:
            buffer.put(packed, at)
    if at_once is None:
        return buffer.value(), sum_
    return jax.block_until_ready(jax.device_put((at_once if in_place else packed).reshape(held.shape))), sum_


def _pieces(shape: tuple[int, ...], numbers: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(index of the leading axes, shape) of what is read at a time: this many numbers, in whole entries of the first axis, or of the second
    where one entry is larger (a layer of experts)."""
    if len(shape) == 1:
        yield (), shape
        return
    axis = 1 if len(shape) > 2 and math.prod(shape[1:]) > numbers else 0
    step = max(1, numbers // max(1, math.prod(shape[axis + 1 :])))
    for before in np.ndindex(shape[:axis]):
        for i in range(0, shape[axis], step):
            yield (*before, i), (1,) * axis + (min(step, shape[axis] - i), *shape[axis + 1 :])


_PIECE_BYTES = 1 << 26


def _at_once_bytes() -> float:
    """What may be copied whole. On a CPU all of it: the copy is the model, and jax takes it as it is."""
    return math.inf if jax.default_backend() == "cpu" else 1 << 28


def ahead(pool: ThreadPoolExecutor, calls: Iterable[Callable[[], T]]) -> Iterator[T]:
    """The results of `calls` in order; each is being made while the one before it is used."""
    pending = None
    for call in calls:
        following = pool.submit(call)
        if pending is not None:
            yield pending.result()
        pending = following
    if pending is not None:
        yield pending.result()


class Keeper:
    """Writes the cache while the model is loaded, and hashes what it holds. A disk that is full costs the cache, not the load.

    content: asked for also where there is no cache to write.
    """

    def __init__(self, path: Path | None, leaves: dict[str, Any], content: Content | None = None):
        self._content = Content() if content is None and path is not None else content
        self._shapes = {name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in leaves.items()}
        self._path, self._writer = path, None
        if path is not None:
            shapes = self._shapes | {_CONTENT: ((32,), np.dtype(np.uint8)), _SUMS: ((len(leaves),), np.dtype(np.int64))}
            self._try(lambda: setattr(self, "_writer", Writer(path, shapes, {"format": str(FORMAT)})))

    def put(self, name: str, value: Any, index: tuple[int, ...]) -> None:
        if self._content is None:
            return
        array = np.asarray(value)
        self._content.put(name, array, index)
        if self._writer is not None:
            writer, (shape, _) = self._writer, self._shapes[name]
            flat = int(np.ravel_multi_index(index, shape[: len(index)])) if index else 0
            self._try(lambda: writer.write(name, array, flat * array.nbytes))

    def wait(self) -> None:
        """Until nothing that was put is read any more."""
        if self._content is not None:
            self._content.wait()

    def _try(self, action: Any) -> None:
        try:
            action()
        except UserError as error:
            writer, self._writer = self._writer, None
            with suppress(UserError):  # what is left in its buffer does not fit either
                if writer is not None:
                    writer.__exit__(UserError)
            note(f"warning: quantized weights are not kept for the next start: {error}")

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        content, writer = self._content, self._writer
        whole = None if content is None else content.finish()
        if kind is None and writer is not None and content is not None and whole is not None:
            hashes = {_CONTENT: np.frombuffer(bytes.fromhex(whole), np.uint8), _SUMS: np.array([content.sums[n] for n in self._shapes])}
            self._try(lambda: [writer.write(*each) for each in hashes.items()])
        if writer is not None and self._writer is not None:
            self._try(lambda: writer.__exit__(kind))
