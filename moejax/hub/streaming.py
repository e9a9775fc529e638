"""Tensors from files into a model's variables, one at a time: read ahead by a thread while the one before is quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import UserError
from moejax.hub.buffers import Buffer, is_here
from moejax.hub.dealing import Deal, deal_of
from moejax.hub.names import Place, attribute, tensors
from moejax.hub.quantized_cache import ahead, part_name
from moejax.hub.safetensors_file import Staging
from moejax.hub.stored import Columns, Source
from moejax.models.build import Model
from moejax.models.ops.quantized import Canonical, QuantizedTensor, encode, stored_parts
from moejax.models.ops.split import joined, pieces_of


class Keep(Protocol):
    """Who gets a copy, as `quantized_cache.Keeper` does."""

    def put(self, name: str, value: Any, index: tuple[int, ...]) -> None: ...

    def wait(self) -> None: ...


def fill(
    model: Model,
    files: dict[str, Any],
    folder: Path,
    *,
    under: str | None = None,
    keep: Keep | None = None,
    advance: Callable[[int], None] = lambda _: None,
    every: bool = True,
) -> bool:
    """Give the base weights of an abstract model (those under attribute `under`, or all) their values from `files`.

    keep: gets a copy of each part as it is stored. advance: called with the bytes of each tensor. every: read all tensors; else not the
    experts that lie on other processes' devices alone, and of matrices that lie on the devices of all this process's share (`Deal`).
    Returns whether all were read. Raises UserError, with file and tensor, where one is missing, has another shape, or holds NaN.
    """
    targets = {(path, attr): parts for (path, attr), parts in by_variable(model).items() if under in (None, path[0])}
    values = {target: getattr(attribute(model, target[0]), target[1]).get_value() for target in targets}
    deals = {target: deal_of(values[target], leading(parts[0][1])) for target, parts in targets.items()}
    wanted = {
        target: [every or _is_read(values[target], deals[target], *part) for part in enumerate(parts)] for target, parts in targets.items()
    }
    staging = Staging()
    calls = (
        partial(_read, files, name, place, tuple(values[target].shape[leading(place) :]), folder, staging.lend, new_rows(model, place))
        for target, parts in targets.items()
        for (name, place), here in zip(parts, wanted[target], strict=True)
        if here
    )
    with ThreadPoolExecutor(1) as pool:
        read = ahead(pool, calls)
        for (path, attr), parts in targets.items():
            variable = getattr(attribute(model, path), attr)
            for (name, place), here in zip(parts, wanted[path, attr], strict=True):
                if not here:
                    advance(_bytes_of(files[name], place))
            own = [(*part, here) for part, here in zip(parts, wanted[path, attr], strict=True) if here or deals[path, attr] is not None]
            variable.set_value(_value(".".join((*path, attr)), values[path, attr], own, read, files, keep, advance, deals[path, attr]))
    return all(map(all, wanted.values()))


def _is_read(abstract: Any, deal: Deal | None, number: int, part: tuple[str, Place]) -> bool:
    """Whether this process is to read a variable's matrix: whether its devices are to have anything of it, if it is not dealt out."""
    if deal is not None:
        return number % deal.count == deal.own
    place = part[1]
    index = _index(place)
    first, piece = next((first, piece) for first, piece in reversed([*pieces_of(abstract)]) if not index or first <= index[0])
    return is_here(jax.tree.leaves(piece)[0], (index[0] - first, *index[1:]) if index else ())


def _index(place: Place) -> tuple[int, ...]:
    """Of a tensor in its variable: layer, expert."""
    return tuple(i for i in (place.layer, place.expert) if i is not None)


def _bytes_of(source: Any, place: Place) -> int:
    return int(source.nbytes) // (2 if place.half is not None else 1)


def by_variable(model: Model) -> dict[tuple[tuple[str, ...], str], list[tuple[str, Place]]]:
    """(path of modules, variable) -> the names and places of the tensors that it is made of, in order of layer and expert."""
    out: dict[tuple[tuple[str, ...], str], list[tuple[str, Place]]] = {}
    for name, several in tensors(model.config).items():
        for place in several:
            out.setdefault((place.path, place.attr), []).append((name, place))
    return out


def _value(
    variable: str, abstract: Any, parts: list[tuple[str, Place, bool]], read: Iterator[Any], files: dict[str, Any], keep: Any, advance: Any,
    deal: Deal | None,
) -> Any:  # fmt: skip
    """The stacked value [L, (E,) …] of one variable. parts: those to be read here (True), or from another process that reads them."""
    pieces = list(pieces_of(abstract))
    found = [_Filled(first, piece) for first, piece in pieces]
    own = pieces[0][1]  # all are stored in the same way
    mine: Any = None
    for number, (name, place, here) in enumerate(parts):
        index = _index(place)
        into = next(one for one in reversed(found) if not index or one.first <= index[0])
        if here:
            stored = _stored(next(read), own, name, files, into.device(index))
            if keep is not None:
                for part, array in stored_parts(stored).items():
                    keep.put(part_name(variable, part), array, index)
            held = stored.tensor(own.layout) if isinstance(stored, Canonical) else stored
            if deal is None:
                into.put(held, index)
            elif number % deal.count == deal.own:
                mine = [jnp.copy(leaf) for leaf in jax.tree.leaves(held)]  # what is read next may take the memory of what was read
            if keep is not None:
                keep.wait()
            advance(_bytes_of(files[name], place))
        if deal is not None and (number % deal.count == deal.count - 1 or number == len(parts) - 1):
            together = [_index(place) for _, place, _ in parts[number - number % deal.count : number + 1]]
            for at, leaves in zip(together, deal.exchanged(mine), strict=False):
                found[0].put(leaves, at)
            mine = None
    return joined(one.value() for one in found)


class _Filled:
    """A piece of a weight, from layer `first` on, as it is filled."""

    def __init__(self, first: int, abstract: Any):
        self.first = first
        flat, self._treedef = jax.tree.flatten(abstract)
        self._buffers = [Buffer(leaf) for leaf in flat]

    def device(self, index: tuple[int, ...]) -> Any:
        """As `Buffer.device`, of the matrix at (layer, expert)."""
        return self._buffers[0].device(self._at(index))

    def put(self, held: Any, index: tuple[int, ...]) -> None:
        """One matrix of the stack, by (layer, expert), or all of what is not stacked; a list: parts of its leaves, as of `Deal.exchanged`.
        Returns when what was read is done with."""
        leaves = held if isinstance(held, list) else [(leaf, None) for leaf in jax.tree.leaves(held)]
        for buffer, (leaf, start_of) in zip(self._buffers, leaves, strict=True):
            buffer.put(leaf, self._at(index), start_of)

    def _at(self, index: tuple[int, ...]) -> tuple[int, ...]:
        return (index[0] - self.first, *index[1:]) if index else ()

    def value(self) -> Any:
        return jax.tree.unflatten(self._treedef, [buffer.value() for buffer in self._buffers])


def _stored(value: Any, abstract: Any, name: str, files: dict[str, Any], device: Any) -> Any:
    """A tensor as the model stores it: an array, or `Canonical` parts; made on a device (None: the first)."""
    if isinstance(value, Canonical):
        return value if isinstance(abstract, QuantizedTensor) else value.tensor().dequantize(abstract.dtype)
    value = jax.device_put(value, device)  # on a CPU the same memory: jnp.asarray would copy
    if not isinstance(abstract, QuantizedTensor):
        _check_finite(value, name, files)
        return value.astype(abstract.dtype)
    try:
        return encode(abstract.kind, value)
    except ValueError:
        raise _not_finite(name, files) from None


def _read(
    files: dict[str, Any], name: str, place: Place, shape: tuple[int, ...], folder: Path, lend: Callable[..., np.ndarray], new: int
) -> Any:
    """A tensor in the host's memory, as stored; of a table that lacks `new` rows, with those."""
    source = checked(files, name, stored_shape(place, shape), folder, new)
    if isinstance(source, Columns):
        return source.read(lend)
    if not isinstance(source, Source):
        return source.read()
    if source.shape[0] < shape[0]:
        return _with_mean_rows(source, lend(shape, source.dtype))
    return (source if place.half is None else source.half(place.half)).read(lend).reshape(shape)


def _with_mean_rows(source: Source, table: np.ndarray) -> np.ndarray:
    """A checkpoint's rows, and behind them their mean, as often as the table has room for it: what transformers'
    `resize_token_embeddings` begins new rows with, but for the noise that it adds."""
    there = source.shape[0]
    source.file.read(source.name, table[:there], source.first)
    pieces = (table[i : min(i + 4096, there)].astype(np.float32).sum(axis=0, dtype=np.float64) for i in range(0, there, 4096))
    table[there:] = (sum(pieces) / there).astype(np.float32).astype(table.dtype)
    return table


def read_tensor(files: dict[str, Any], name: str, model: Model, folder: Path) -> Any:
    """One tensor of a checkpoint, as stored: an array, or `Canonical` parts where it is in 4 bits.

    Raises UserError where it is missing, of another shape or no number.
    """
    places = tensors(model.config)[name]
    shape, new = whole_shape(model, places), new_rows(model, places[0])
    source = checked(files, name, shape, folder, new)
    raw = _with_mean_rows(source, np.empty(shape, source.dtype)) if new and source.shape[0] < shape[0] else source.read()
    if not isinstance(raw, Canonical):
        _check_finite(raw, name, files)
    return raw


def new_rows(model: Model, place: Place) -> int:
    """Rows of a tensor that a checkpoint may lack: of the embedding and the head, those of added tokens."""
    return model.config.new_rows if place.layer is None and place.path in (("embed",), ("head",)) else 0


def checked(files: dict[str, Any], name: str, shape: tuple[int, ...], folder: Path, new: int = 0) -> Any:
    """The source of a tensor, which is of this shape, or lacks the last `new` rows of it, and of a kind that is read."""
    if name not in files:
        raise UserError(f"{folder}: tensor {name!r} is missing: download the checkpoint again")
    source, where = files[name], f"{files[name].file.path}: tensor {files[name].name!r}"
    whole = (shape[0] - new, *shape[1:])
    if source.shape not in (shape, whole):
        raise UserError(f"{where} has shape {list(source.shape)}, expected {list(whole)} by its config.json")
    if isinstance(source, Source | Columns) and source.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise UserError(f"{where} is {source.dtype}: expected bfloat16, float16 or float32")
    return source


def _check_finite(value: Any, name: str, files: dict[str, Any]) -> None:
    if not bool(_all_finite(value)):
        raise _not_finite(name, files)


def _not_finite(name: str, files: dict[str, Any]) -> UserError:
    where = f"{files[name].file.path}: tensor {files[name].name!r}"
    return UserError(f"{where} holds NaN or infinity: download it again, or give another checkpoint")


@jax.jit
def _all_finite(value: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(value))


def stored_shape(place: Place, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A checkpoint's shape of a tensor that is `shape` here: twice the rows for two halves; torch's depthwise kernel is [D, 1, K]."""
    if place.path[-1] == "conv" and place.attr == "weight":
        return (shape[0], 1, shape[1])
    return (2 * shape[0], *shape[1:]) if place.half is not None else shape


def whole_shape(model: Model, places: tuple[Place, ...]) -> tuple[int, ...]:
    """The shape of a tensor as the checkpoint stores it."""
    place = places[0]
    value = getattr(attribute(model, place.path), place.attr).get_value()
    return stored_shape(place, tuple(value.shape[leading(place) :]))


def leading(place: Place) -> int:
    """How many axes of a variable stand before those of one tensor: layer, expert."""
    return len(_index(place))
