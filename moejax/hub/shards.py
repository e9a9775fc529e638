"""A Hub model shard by shard: fetched, quantized, deleted. What stays is a folder of the same model with NF4 matrices as bitsandbytes
stores them, and every other tensor as it was: anyone who reads a checkpoint reads it.

A shard's file in the folder is there whole, or not at all, and the index is written last: cut at any moment, the next start goes on with
the shards that are lacking.
"""

from __future__ import annotations

import fcntl
import json
import math
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax.contents import sizes_content
from moejax.documents import read_json
from moejax.errors import UserError
from moejax.files import replace_text
from moejax.hub import bitsandbytes, mxfp4, snapshot, weights
from moejax.hub.names import attribute, renamed, stacked, tensors
from moejax.hub.quantized_cache import ahead
from moejax.hub.safetensors_file import SUMS, Reader, Staging, Summed, Writer
from moejax.hub.stored import INDEX, MADE_FROM, expanded, weight_map
from moejax.hub.streaming import checked, new_rows, whole_shape
from moejax.models.build import Model
from moejax.models.ops.quantized import QuantizedTensor, encode
from moejax.progress import bar, note, say

FORMAT = 1  # raise it when what is written changes
_FETCHING = "fetching"


def place(cache: Path, source: str, commit: str, model: Model) -> Path:
    """The folder of a Hub id at a commit, quantized as `model` (abstract) stores it: whatever it computes in or adapts."""
    quantized = sorted((name, kind) for name, kind in _kinds(model).items() if kind is not None)
    which = zlib.crc32(json.dumps([FORMAT, quantized]).encode())
    return cache / f"{source.partition('@')[0].replace('/', '--')}-{commit[:12]}-4bit-{which:08x}"


def is_whole(folder: Path) -> bool:
    """Whether all is there, by the sizes of its files."""
    if not (folder / INDEX).is_file():
        return False
    kept = read_json(folder / MADE_FROM, remedy=f"remove {folder}").get("kept") or {}
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in kept.items())


def shards_of(small: Path, sizes: Mapping[str, int]) -> dict[str, int]:
    """Of the weight files of a repository (name -> bytes) those that its model lies in. small: its folder without weights.

    Raises UserError where there are no safetensors, or the index names one that is not there.
    """
    index = small / INDEX
    names = sorted(set(weight_map(index).values())) or ["model.safetensors"]
    lost = next((name for name in names if name not in sizes), None)
    if lost is not None:
        raise UserError(
            f"model.download = stream: the repository has no {lost} (it has {', '.join(sorted(sizes)[:4]) or 'no weights'}): only "
            "safetensors are streamed, set model.download=whole"
        )
    return {name: sizes[name] for name in names}


def kept_bytes(model: Model, shard_bytes: int) -> int:
    """Of the folder, once it is whole. shard_bytes: of all shards, whose numbers are all of one size."""
    kinds = _kinds(model)
    shapes = {name: whole_shape(model, places) for name, places in tensors(model.config).items()}
    raw = sum(math.prod(shape) for name, shape in shapes.items() if kinds[name] is None)
    per_number = shard_bytes / sum(math.prod(shape) for shape in shapes.values())
    written = (bitsandbytes.stored_shapes(name, kind, shapes[name]) for name, kind in kinds.items() if kind is not None)
    # Of each tensor also its entry in the file's header, and its checksum.
    coded = sum(math.prod(shape) * dtype.itemsize + len(part) + 90 for parts in written for part, (shape, dtype) in parts.items())
    return int(raw * per_number) + coded


def written_bytes(folder: Path, shards: Mapping[str, int]) -> int:
    return sum((folder / name).stat().st_size for name in shards if (folder / name).is_file())


def lacking(folder: Path, shards: Mapping[str, int]) -> dict[str, int]:
    """Those that are still to be fetched."""
    return {name: size for name, size in shards.items() if not (folder / name).is_file()}


def fetch(source: str, small: Path, folder: Path, shards: Mapping[str, int], model: Model) -> None:
    """Make `folder` whole. small: the Hub's snapshot of `source` without weights; a shard that lies there is read there, and stays.

    model: abstract, says what is quantized. On the disk lies at most one shard next to what is kept. Raises UserError, with file and
    tensor, for a tensor that is no part of the model, has another shape, or holds NaN or infinity; before anything is fetched where the
    index tells.
    """
    where = weight_map(small / INDEX)
    if where:
        _check_names(where, model, small / INDEX)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if is_whole(folder):
                return
            (folder / INDEX).unlink(missing_ok=True)
            _remove_damaged(folder, shards)
            shutil.rmtree(folder / _FETCHING / ".cache", ignore_errors=True)  # what a process that was killed had of a shard
            for name in shards.keys() - lacking(folder, shards):
                (folder / _FETCHING / name).unlink(missing_ok=True)
            for number, name in enumerate(shards, 1):
                if (folder / name).is_file():
                    continue
                say(f"shard {number} of {len(shards)}: {name}")
                if (small / name).is_file():
                    _keep(small / name, folder / name, model, where)
                    continue
                fetched = snapshot.fetch_file(source, small.name, name, folder / _FETCHING)
                _keep(fetched, folder / name, model, where)
                fetched.unlink()
            shutil.rmtree(folder / _FETCHING, ignore_errors=True)
            _finish(folder, small, shards)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} cannot be written ({error.strerror or error}): make room there, or set quantization.cache to "
            "another disk. What is there already is not fetched again"
        ) from None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While no other process of this machine works there."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note(f"{folder}: another process is fetching into it, which is waited for")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # some network file systems have no locks
            pass
        yield


def _kinds(model: Model) -> dict[str, str | None]:
    """Name of every tensor of the checkpoint -> how it is quantized (of `quantized.KINDS`), or None."""
    found = {}
    for name, places in tensors(model.config).items():
        value = getattr(attribute(model, places[0].path), places[0].attr).get_value()
        found[name] = value.kind if isinstance(value, QuantizedTensor) else None
    return found


def _check_names(names: Iterable[str], model: Model, where: Path) -> None:
    """Raises UserError as `weights.check_names` does, by the names of all tensors."""
    _refuse_quantized(names, where)
    several, other = stacked(model.config), renamed(model.config)
    own = [part.name for name in names if name in several for part in several[name]]
    weights.check_names(dict.fromkeys([*own, *(other.get(name, name) for name in names if name not in several)]), model, where)


def _refuse_quantized(names: Iterable[str], where: Path) -> None:
    if any(bitsandbytes.STATE in name or name.endswith(mxfp4.BLOCKS) for name in names):
        raise UserError(f"{where} is of a model in 4 bits already, which is fetched as it is: set model.download=whole")


def _remove_damaged(folder: Path, shards: Mapping[str, int]) -> None:
    """Files that are not what was written: anyone who goes on reads each once."""
    there, staging = [folder / name for name in shards if (folder / name).is_file()], Staging()
    if not there:
        return
    with bar("checking", sum(path.stat().st_size for path in there), "bytes") as advance:
        for path in there:
            size = path.stat().st_size
            try:
                reader = Summed(path)
                for name in reader.names():
                    reader.read(name, staging.lend(reader.shape(name), reader.dtype(name)))
                reader.close()
            except UserError as error:
                note(f"warning: {error}; its shard is fetched again")
                path.unlink()
            advance(size)


def _keep(shard: Path, path: Path, model: Model, where: Mapping[str, str]) -> None:
    """Write a shard's tensors, those in NF4 that `model` has so, each with its checksum. where: the index, which may know better."""
    reader, kinds = Reader(shard), _kinds(model)
    _refuse_quantized(reader.names(), shard)
    sources: dict[str, Any] = {}
    for name in (name for name in reader.names() if where.get(name, shard.name) == shard.name):
        sources |= expanded(reader, name, model.config)
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {}
    for name, source in sources.items():
        places, kind = tensors(model.config).get(name), kinds.get(name)
        if places is not None:
            checked(sources, name, whole_shape(model, places), shard, new_rows(model, places[0]))
        shapes |= {name: (source.shape, source.dtype)} if kind is None else bitsandbytes.stored_shapes(name, kind, source.shape)
    shapes[SUMS] = (len(shapes),), np.int64
    sums: dict[str, int] = {}
    staging = Staging()
    with (
        Writer(path, shapes, {"format": "pt", "sums": SUMS}) as writer,
        ThreadPoolExecutor(1) as pool,
        bar(f"quantizing {path.name}", sum(source.nbytes for source in sources.values()), "bytes") as advance,
    ):
        read = ahead(pool, (partial(source.read, staging.lend) for source in sources.values()))
        for (name, source), value in zip(sources.items(), read, strict=True):
            parts, kind = {name: value}, kinds.get(name)
            if kind is not None:
                try:
                    parts = bitsandbytes.as_stored(name, encode(kind, jax.device_put(value)), source.dtype)
                except ValueError:
                    raise UserError(
                        f"{shard}: tensor {source.name!r} holds NaN or infinity: download it again, or give another checkpoint"
                    ) from None
            for part, array in parts.items():
                sums[part] = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
                writer.write(part, array)
            advance(source.nbytes)
        writer.write(SUMS, np.array([sums[name] for name in shapes if name != SUMS]))
    reader.close()


def _finish(folder: Path, small: Path, shards: Mapping[str, int]) -> None:
    """What makes a model of the files: configuration, tokenizer, where they come from; last the index."""
    for path in snapshot.small_files(small):
        shutil.copyfile(path, folder / path.name)
    indices = sorted(small.glob("*.index.json"))
    kept = {name: (folder / name).stat().st_size for name in shards}
    made_from = {"commit": small.name, "base_files": sizes_content(shards, indices), "shards": dict(shards), "kept": kept}
    replace_text(folder / MADE_FROM, json.dumps(made_from, indent=2) + "\n")
    where = {name: shard for shard in shards for name in Summed(folder / shard).names()}
    content = {"metadata": {"total_size": sum(kept.values())}, "weight_map": where}
    replace_text(folder / INDEX, json.dumps(content, indent=2) + "\n")
