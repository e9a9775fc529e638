"""Where the tensors of a folder in Hub layout lie: its index, its shards, one expert's rows of a fused tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moejax.documents import read_json
from moejax.errors import UserError
from moejax.hub import bitsandbytes, mxfp4
from moejax.hub.names import Part, in_and_out, renamed, stacked
from moejax.hub.safetensors_file import Summed, aligned
from moejax.hub.torch_file import TorchFile
from moejax.models.config import Architecture

AGAIN = "download it again, or copy it"
INDEX = "model.safetensors.index.json"
MADE_FROM = "made_from.json"
"""Of a folder that `hub.shards` made: base_files is what `weights.files_of` says of the shards that it was made from."""


class Source(NamedTuple):
    """Where a tensor is read: `shape` numbers of a file's tensor, from the `first` on (of one expert's, where it is of all)."""

    file: Any
    name: str
    shape: tuple[int, ...]
    first: int = 0

    @property
    def dtype(self) -> np.dtype[Any]:
        found: np.dtype[Any] = self.file.dtype(self.name)
        return found

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def half(self, number: int) -> Source:
        """The first or the second half of its rows."""
        shape = (self.shape[0] // 2, *self.shape[1:])
        return self._replace(shape=shape, first=self.first + number * math.prod(shape))

    def read(self, lend: Callable[..., np.ndarray] = aligned) -> np.ndarray:
        """Its numbers, in memory that `lend(shape, dtype)` gives."""
        array: np.ndarray = self.file.read(self.name, lend(self.shape, self.dtype), self.first)
        return array


class Columns(NamedTuple):
    """Where an expert's tensor is read that stands on its side: some `columns` of the `stored` numbers of a file's tensor from the `first`
    on, as rows. A bias is one row."""

    file: Any
    name: str
    stored: tuple[int, ...]
    first: int
    columns: slice

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(range(*self.columns.indices(self.stored[-1]))), *self.stored[:-1])

    @property
    def dtype(self) -> np.dtype[Any]:
        found: np.dtype[Any] = self.file.dtype(self.name)
        return found

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, lend: Callable[..., np.ndarray] = aligned) -> np.ndarray:
        """Its numbers, in memory that `lend(shape, dtype)` gives."""
        there = self.file.read(self.name, aligned(self.stored, self.dtype), self.first)
        array = lend(self.shape, self.dtype)
        array[...] = there[..., self.columns].T
        return array


def open_tensors(folder: Path, stack: ExitStack, config: Architecture) -> dict[str, Any]:
    """tensor name -> where it is read: a `Source`, a `bitsandbytes.Quantized`, or an `mxfp4.Matrix`. Raises UserError naming the file.

    From model.safetensors or pytorch_model.bin, whole or in shards that an index names; safetensors where there are both.

    Tensors over all experts appear under their experts' own names, as `config` has them.
    """
    where, files = _layout(folder)
    if not files:
        raise UserError(_no_weights(folder))
    held: dict[str, Any] = {}
    for path in files:
        if not path.is_file():
            raise UserError(f"{folder} lacks {path.name}, which its index names: download it again")
        file = Summed(path) if path.suffix == ".safetensors" else stack.enter_context(TorchFile(path))
        held |= {name: Source(file, name, file.shape(name)) for name in file.names() if where.get(name, path.name) == path.name}
    lost = sorted(where.keys() - held.keys())
    if lost:
        raise UserError(
            f"{folder}: {where[lost[0]]} lacks tensor {lost[0]!r}, which the index says it holds ({len(lost)} such): download it again"
        )
    found: dict[str, Any] = {}
    for name, source in mxfp4.gather(bitsandbytes.gather(held)).items():
        match source:
            case Source():
                found |= expanded(source.file, name, config)
            case mxfp4.Packed():
                found |= {p.name: source.matrix(p) for p in _parts(source, name, config)}
            case _:
                found[name] = source
    return found


def expanded(file: Any, name: str, config: Architecture) -> dict[str, Source | Columns]:
    """By the checkpoint's own names: the tensors of one expert each that a file's tensor holds; itself where it is of one or none."""
    whole = Source(file, name, file.shape(name))
    if name not in stacked(config):
        return {renamed(config).get(name, name): whole}
    if in_and_out(config):
        return _columns(whole, stacked(config)[name])
    parts, found = _parts(whole, name, config), dict[str, Source | Columns]()
    _, count, columns = whole.shape
    for part in parts:
        rows = part.rows(count)
        found[part.name] = whole._replace(shape=(rows.stop - rows.start, columns), first=(part.expert * count + rows.start) * columns)
    return found


def _parts(source: Any, name: str, config: Architecture) -> tuple[Part, ...]:
    """Of a tensor over all experts. Raises UserError for one of another shape, and one that the model does not have."""
    parts, shape = stacked(config).get(name), source.shape
    if parts is None:
        raise UserError(f"{source.file.path}: tensor {source.name!r} has no place in a {config.title} of {config.num_layers} layers")
    halves = 1 if parts[0].half is None else 2
    if len(shape) != 3 or shape[1] % halves:
        raise UserError(f"{source.file.path}: tensor {name!r} has shape {list(shape)}, expected [experts, rows, columns]")
    if shape[0] * halves != len(parts):
        raise UserError(f"{source.file.path}: tensor {name!r} is of {shape[0]} experts, expected {len(parts) // halves} by its config.json")
    return parts


def _columns(whole: Source, parts: tuple[Part, ...]) -> dict[str, Source | Columns]:
    """Of a tensor [experts, in, out], or [experts, out] of biases."""
    experts, *stored = whole.shape
    axes, halves = 1 if parts[0].name.endswith(".bias") else 2, 1 if parts[0].half is None else 2
    where = f"{whole.file.path}: tensor {whole.name!r}"
    if len(stored) != axes or stored[-1] % halves:
        expected = "[experts, rows]" if axes == 1 else "[experts, columns, rows]"
        raise UserError(f"{where} has shape {[experts, *stored]}, expected {expected}")
    if experts * halves != len(parts):
        raise UserError(f"{where} is of {experts} experts, expected {len(parts) // halves} by its config.json")
    return {p.name: Columns(whole.file, whole.name, tuple(stored), p.expert * math.prod(stored), p.rows(stored[-1])) for p in parts}


_WHOLE = ("model.safetensors", "pytorch_model.bin")  # each may lie in shards with an index instead; the first that is there is read


def _layout(folder: Path) -> tuple[dict[str, str], list[Path]]:
    """Tensor name -> file, as the index has it (empty without one), and the weight files of a folder, which may be missing."""
    for whole in _WHOLE:
        where = weight_map(folder / f"{whole}.index.json", Path(whole).suffix)
        if where:
            return where, [folder / name for name in sorted(set(where.values()))]
        if (folder / whole).is_file():
            return {}, [folder / whole]
    return {}, []


def weight_map(index: Path, suffix: str = ".safetensors") -> dict[str, str]:
    """Tensor name -> file, by an index; empty where there is none. Raises UserError for files elsewhere."""
    if not index.is_file():
        return {}
    where = read_json(index, remedy=AGAIN).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(f, str) for f in where.values()):
        raise UserError(f"{index} lacks weight_map: expected the file of every tensor in it")
    for shard in sorted(set(where.values())):
        if Path(shard).name != shard or Path(shard).suffix != suffix:
            raise UserError(f"{index} names a file {shard!r}: expected *{suffix} files of the same folder")
    return where


def _no_weights(folder: Path) -> str:
    """What was looked for, and what is there instead."""
    kinds = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")
    others = sorted(path.name for path in folder.iterdir() if path.name.endswith(kinds))
    there = f"; there is {', '.join(others[:4])}{', …' if len(others) > 4 else ''}, which is not read" if others else ""
    return f"{folder} has none of {', '.join(f'{name}, {name}.index.json (with its shards)' for name in _WHOLE)}{there}"


def weight_files(folder: Path) -> list[Path]:
    """The files that a folder's weights are read from."""
    return _layout(folder)[1]
