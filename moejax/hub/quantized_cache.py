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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from moejax import __version__, processes
from moejax.errors import UserError
from moejax.hub.buffers import Buffer, part_here
from moejax.hub.dealing import deal_of, joint_crc32
from moejax.hub.safetensors_file import Reader, Staging, Writer, aligned
from moejax.models.ops.quantized import QuantizedTensor, stored_parts
from moejax.models.ops.split import joined, pieces_of, whole
from moejax.progress import note

T = TypeVar("T")

FORMAT = 4  # raise it when codes, scales or names change
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

    sums: (name, entry) -> CRC-32 of its bytes, where its parts came in order. partial: other processes read the rest. `put` returns at
    once; `wait` before the memory of what was put changes.
    """

    def __init__(self) -> None:
        self.value: str | None = None
        self.partial = False
        self.sums: dict[tuple[str, tuple[int, ...]], int] = {}
        self._parts: dict[str, str] = {}
        self._pending: list[tuple[str, Future[str]]] = []
        self._pool = ThreadPoolExecutor(1)

    def put(self, name: str, array: np.ndarray, index: tuple[int, ...], entry: tuple[int, ...] = ()) -> None:
        data = _bytes(array)
        kind = f"{name} {list(index)} {array.dtype} {list(array.shape)}"
        self._pending.append((kind, self._pool.submit(self._hashed, (name, entry), data)))

    def _hashed(self, entry: tuple[str, tuple[int, ...]], data: memoryview) -> str:
        self.sums[entry] = zlib.crc32(data, self.sums.get(entry, 0))
        return hashlib.sha256(data).hexdigest()

    def wait(self) -> None:
        self._parts |= {kind: digest.result() for kind, digest in self._pending}
        self._pending.clear()

    def finish(self) -> str | None:
        """The hash of all that was put; None where that is a part."""
        self.wait()
        self._pool.shutdown()
        self.value = None if self.partial else _hash_of(self._parts)
        return self.value

    def agree(self) -> None:
        """With several processes, of which some have read a part: the hash of the parts of all. All call it. Raises UserError where two
        have read different contents of one tensor."""
        if processes.count() == 1:
            return
        found = [json.loads(text) for text in processes.gathered(json.dumps([self.value, {} if self.value else self._parts]))]
        together: dict[str, str] = {}
        for number, (_, parts) in enumerate(found):
            other = next((kind for kind, digest in parts.items() if together.setdefault(kind, digest) != digest), None)
            if other is not None:
                name = other.split()[0]
                raise UserError(f"process {number} has read another {name} than a process before it: give all the same model.source")
        self.value = self.value or next((value for value, _ in found if value), None) or _hash_of(together)


def _hash_of(parts: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(parts.items())).encode()).hexdigest()


_CONTENT = "content_sha256"  # a tensor of its own: what the other tensors hash to, as they were streamed
_SUMS = "crc32"  # another one: of each entry of each tensor, in their order


def read(
    path: Path, variables: Mapping[str, Any], content: Content | None = None, stacked: Mapping[str, int] | None = None
) -> dict[str, Any] | None:
    """The values of (abstract) variables from a cache, and into `content` the hash that is kept with them. Over a mesh a process reads the
    experts alone that its devices have, and of rows that lie on the devices of all its own; all call it then.

    stacked: as the `Keeper` had it. None where there is none, or it is not what was asked for or (which is reported) not what was written:
    it is then made again. Nothing ({}) where it is there, and another process, of another disk, has none."""
    leaves, entries = leaves_of(variables), _entries(leaves_of(variables), stacked)
    reader = _opened(path, {name: tuple(leaf.shape) for name, leaf in leaves.items()} | {_SUMS: (sum(entries.values()),)})
    dealt = any(deal_of(value, (stacked or {}).get(name, 0)) is not None for name, value in variables.items())
    lacking = dealt and "" in processes.gathered("" if reader is None else "there")
    if reader is None:
        return None
    if lacking:  # all read it, or none
        return {}
    values: dict[str, Any] = {}
    sums: dict[str, dict[int, int]] = {}  # of the entries that are read
    rows: dict[str, int] = {}  # of which a part was read: its bytes
    staging = Staging()
    with ThreadPoolExecutor(1) as pool:
        for name, variable in variables.items():
            pieces = list(pieces_of(variable))
            arrays: list[dict[str, jax.Array]] = [{} for _ in pieces]
            for part in stored_parts(pieces[0][1]):
                own = sums.setdefault(part_name(name, part), {})
                for (first, piece), found in zip(pieces, arrays, strict=True):
                    found[part] = _held(reader, name, piece, part, pool, staging, first, (stacked or {}).get(name, 0), own, rows)
            values[name] = joined(
                piece.with_parts(found) if isinstance(piece, QuantizedTensor) else found[""]
                for (_, piece), found in zip(pieces, arrays, strict=True)
            )
    if dealt:
        _put_together(sums, rows)
    known, changed, at = reader.read(_SUMS).tolist(), list[str](), 0
    for name, count in entries.items():
        changed += [name] * any(known[at + entry] != sum_ for entry, sum_ in sums[name].items())
        at += count
    if dealt:
        changed = [name for told in processes.gathered(json.dumps(changed)) for name in json.loads(told)]
    if changed:
        note(f"warning: {path}: {changed[0]} is not what was written there; it is made anew from the checkpoint")
        if not processes.is_first():  # the first one may have read what is whole: it makes it anew at the next start
            path.unlink(missing_ok=True)
        return None
    if content is not None:
        content.value = reader.read(_CONTENT).tobytes().hex()
    return values


def _opened(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Reader | None:
    """A file with tensors of these shapes, and the hash of them; None where it is not there, or another one."""
    if not path.is_file():
        return None
    try:
        reader = Reader(path)
    except UserError:
        return None
    if set(reader.names()) != {*shapes, _CONTENT} or any(reader.shape(name) != shape for name, shape in shapes.items()):
        return None
    return reader


def _put_together(sums: dict[str, dict[int, int]], rows: Mapping[str, int]) -> None:
    """The CRC-32s of whole entries, in the place of those of each process's rows of them, whose bytes `rows` has."""
    own = {name: [sums[name][entry] for entry in sorted(sums[name])] for name in rows}
    found = [json.loads(told) for told in processes.gathered(json.dumps([own, rows]))]
    for name in rows:
        for number, entry in enumerate(sorted(sums[name])):
            together = 0
            for crcs, nbytes in found:
                together = joint_crc32(together, crcs[name][number], nbytes[name])
            sums[name][entry] = together


def _entries(leaves: Mapping[str, Any], stacked: Mapping[str, int] | None) -> dict[str, int]:
    """Name -> how many entries a tensor has that have a checksum each: matrices of a stack."""
    axes = {name: next((n for own, n in (stacked or {}).items() if name == own or name.startswith(f"{own}.")), 0) for name in leaves}
    return {name: math.prod(leaf.shape[: axes[name]]) for name, leaf in leaves.items()}


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _held(
    reader: Reader, name: str, variable: Any, part: str, pool: ThreadPoolExecutor, staging: Staging, first: int, stacked: int,
    sums: dict[int, int], rows: dict[str, int],
) -> jax.Array:  # fmt: skip
    """A part of a variable, or of its layers from the `first` on, in memory's form; into `sums` the CRC-32s of its entries in the file, or
    of this process's rows of them, and into `rows` their bytes. Each piece is packed, or put into its place, while the next one is read."""
    stored, held = stored_parts(variable)[part], variable.parts()[part] if part else variable
    shape, dtype = stored.shape or (1,), np.dtype(stored.dtype)
    buffer, limit = Buffer(held), _at_once_bytes()
    size = math.prod(shape[stacked:])  # of an entry
    begin_row, end_row, row = _rows_here(held, variable, stacked, size)
    in_place = not part or variable.packs_in_place(part)
    at_once = aligned(shape, dtype) if buffer.whole and (math.prod(shape) * dtype.itemsize <= limit or len(shape) == 1) else None
    numbers = int(min(limit, _PIECE_BYTES)) // dtype.itemsize
    own = buffer.own(1) if stacked == 2 else None
    pieces = [((), shape)] if at_once is not None and not in_place else list(_pieces(shape, numbers, own))
    if row:
        of_rows = ((end_row - begin_row) * row,) if part else (end_row - begin_row, row)
        pieces = [(at, (1,) * stacked + of_rows) for at in np.ndindex(shape[:stacked])]
        rows[part_name(name, part)] = math.prod(of_rows) * dtype.itemsize
        variable = replace(variable, matrix=(end_row - begin_row, variable.matrix[1])) if part else variable

    def begin(at: tuple[int, ...]) -> int:
        return (int(np.ravel_multi_index(at, shape[: len(at)])) * math.prod(shape[len(at) :]) if at else 0) + begin_row * row

    def reading(at: tuple[int, ...], piece: tuple[int, ...]) -> Callable[[], np.ndarray]:
        start = begin(at)
        into = staging.lend(piece, dtype) if at_once is None else at_once.reshape(-1)[start : start + math.prod(piece)].reshape(piece)
        return partial(reader.read, part_name(name, part), into, first * math.prod(shape[1:]) + start)

    packed: Any = None
    for (at, _), piece in zip(pieces, ahead(pool, (reading(*each) for each in pieces)), strict=True):
        if row:
            sums[int(np.ravel_multi_index(at, shape[:stacked]))] = zlib.crc32(_bytes(piece))
        else:
            _add(sums, piece, first * math.prod(shape[1:]) + begin(at), size)
        packed = variable.pack(part, piece, in_place=True) if part else piece
        if at_once is None:
            buffer.put(packed, at, (held.ndim - 2, begin_row) if row else None)
    if at_once is None:
        return buffer.value()
    return jax.block_until_ready(jax.device_put((at_once if in_place else packed).reshape(held.shape)))


def _rows_here(held: Any, variable: Any, stacked: int, size: int) -> tuple[int, int, int]:
    """(from which to which row, numbers of a row in the file) of what this process reads of each entry of `size` numbers; (0, 0, 0): all of
    it, as of columns, and of rows that are not whole bytes."""
    part = part_here(held)
    if part is None or part[0] != held.ndim - 2 or part[0] < stacked or getattr(variable, "layout", "") == "columns":
        return 0, 0, 0
    out = held.shape[part[0]]
    return (part[1], part[2], held.shape[-1]) if out * held.shape[-1] == size else (0, 0, 0)


def _add(sums: dict[int, int], piece: np.ndarray, start: int, size: int) -> None:
    """Into the CRC-32s of entries of `size` numbers each what was read from the `start`-th number on: an entry's pieces in order."""
    rest = piece.reshape(-1)
    while rest.size:
        entry, within = divmod(start, size)
        part, rest = rest[: size - within], rest[size - within :]
        sums[entry] = zlib.crc32(_bytes(part), sums[entry] if within else 0)
        start += part.size


def _pieces(
    shape: tuple[int, ...], numbers: int, own: tuple[int, int] | None = None
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(index of the leading axes, shape) of what is read at a time: this many numbers, in whole entries of the first axis, or of the second
    where one entry is larger (a layer of experts). own: from where to where on the second axis."""
    if len(shape) == 1:
        yield (), shape
        return
    some = own is not None and own != (0, shape[1])
    axis = 1 if some or (len(shape) > 2 and math.prod(shape[1:]) > numbers) else 0
    first, end = own if own is not None and some else (0, shape[axis])
    step = max(1, numbers // max(1, math.prod(shape[axis + 1 :])))
    for before in np.ndindex(shape[:axis]):
        for i in range(first, end, step):
            yield (*before, i), (1,) * axis + (min(step, end - i), *shape[axis + 1 :])


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

    content: asked for also where there is no cache to write. stacked: variable -> over how many leading axes its tensors are stacked, each
    of which has a checksum of its own.
    """

    def __init__(
        self, path: Path | None, leaves: dict[str, Any], content: Content | None = None, stacked: Mapping[str, int] | None = None
    ):
        self._entries = _entries(leaves, stacked)
        self._content = Content() if content is None and path is not None else content
        self._shapes = {name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in leaves.items()}
        self._path, self._writer = path, None
        if path is not None:
            shapes = self._shapes | {_CONTENT: ((32,), np.dtype(np.uint8)), _SUMS: ((sum(self._entries.values()),), np.dtype(np.int64))}
            self._try(lambda: setattr(self, "_writer", Writer(path, shapes, {"format": str(FORMAT)})))

    @property
    def writes(self) -> bool:
        return self._writer is not None

    def put(self, name: str, value: Any, index: tuple[int, ...]) -> None:
        if self._content is None:
            return
        array = np.asarray(value)
        self._content.put(name, array, index, index if self._entries[name] > 1 else ())
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
        if content is not None:
            content.finish()
        if kind is None and writer is not None and content is not None and content.value is not None:
            by_name = {name: sorted(entry for own, entry in content.sums if own == name) for name in self._shapes}
            sums = np.array([content.sums[name, entry] for name, entries in by_name.items() for entry in entries])
            hashes = {_CONTENT: np.frombuffer(bytes.fromhex(content.value), np.uint8), _SUMS: sums}
            self._try(lambda: [writer.write(*each) for each in hashes.items()])
        if writer is not None and self._writer is not None:
            self._try(lambda: writer.__exit__(kind))
