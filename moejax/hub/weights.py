"""Whole models in Hub layout, read into a model, quantized tensor by tensor. `save` writes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from models.build import Model, materialize_lora
from models.config import Architecture, from_hub_config
from models.ops import nf4
from moejax.errors import UserError
from moejax.hub import bitsandbytes, quantized_cache
from moejax.hub.names import Place, tensors
from moejax.hub.quantized_cache import Keeper
from moejax.hub.snapshot import resolve
from moejax.hub.stored import open_tensors, read_json, weight_files

__all__ = ["load_weights", "open_tensors", "read_config", "read_tensor", "report", "resolve"]


def read_config(folder: Path) -> Architecture:
    """The architecture in the folder's config.json. Raises UserError naming the file."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no config.json: expected a model in Hub layout")
    content = read_json(path)
    try:
        return from_hub_config(content)
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path}: {what}") from None


def load_weights(
    model: Model, folder: Path, lora_key: jax.Array, *, cache: Path | None = None, console: Console | None = None
) -> Model:
    """Fill an abstract model (`models.build.build` without a key) from a folder's safetensors or .bin; adapters from `lora_key`.

    One tensor at a time: read by memory map, cast or quantized (each expert's matrix by itself), put into its place on the device,
    so that the host never holds more than a few tensors. cache: the folder that keeps quantized weights for the next start
    (`quantized_cache`). console: where progress and the report of what is stored how are shown. Raises UserError naming file and
    tensor where one is missing, has another shape, holds NaN, or has no place in this architecture.
    """
    places = tensors(model.config)
    by_variable: dict[tuple[tuple[str, ...], str], list[tuple[str, Place]]] = {}
    for name, several in places.items():
        for place in several:
            by_variable.setdefault((place.path, place.attr), []).append((name, place))
    targets = {".".join((*path, attr)): getattr(attribute(model, path), attr) for path, attr in by_variable}
    abstract = {name: variable.get_value() for name, variable in targets.items()}
    flat, treedef = jax.tree_util.tree_flatten_with_path(abstract)
    leaves = {_leaf_name(path): leaf for path, leaf in flat}
    with ExitStack() as stack:
        files = open_tensors(folder, stack)
        _refuse_unknown(files, places, model.config, folder)
        bitsandbytes.check(files, ((n, abstract[".".join((*p.path, p.attr))]) for n, several in places.items() for p in several))
        quantized = any(isinstance(value, nf4.NF4Tensor) for value in abstract.values())
        if any(isinstance(source, bitsandbytes.Quantized) for source in files.values()):
            cache = None  # the checkpoint is as small, and as fast to read
        path = _cache_path(cache, folder, leaves, repr(model.config)) if cache is not None and quantized else None
        kept = None if path is None else quantized_cache.read(path, leaves)
        if kept is not None:
            values = jax.tree.unflatten(treedef, [kept[name] for name in leaves])
            for name, variable in targets.items():
                variable.set_value(values[name])
        else:
            keep = stack.enter_context(Keeper(path, leaves, console))
            bar = stack.enter_context(_progress(console))
            task = bar.add_task("loading", total=sum(files[n].nbytes // len(p) for n, p in places.items() if n in files for _ in p))
            for (name, variable), parts in zip(targets.items(), by_variable.values(), strict=True):
                variable.set_value(_fill(name, variable.get_value(), parts, files, folder, keep, lambda n: bar.advance(task, n)))
    if console is not None:
        for line in report(model):
            console.print(line, highlight=False)
    return materialize_lora(model, lora_key)


def stored_bytes(folder: Path) -> int:
    """Bytes of a folder's weight files, as far as they are there."""
    return sum(path.stat().st_size for path in weight_files(folder) if path.is_file())


def report(model: Model) -> list[str]:
    """What is stored how: a line for each group of weights and dtype, with parameters and bytes (packed codes and scales counted)."""
    found: dict[str, dict[str, list[int]]] = {}
    for name, variable in base_variables(model):
        value = variable.get_value()
        kind = "NF4" if isinstance(value, nf4.NF4Tensor) else str(jnp.dtype(value.dtype))
        count = found.setdefault(_group(name), {}).setdefault(kind, [0, 0])
        count[0] += value.size
        count[1] += sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(value))
    lines = []
    for group, kinds in found.items():
        parts = [f"{_short(size)} parameters, {kind}, {_size(nbytes)}" for kind, (size, nbytes) in kinds.items()]
        left = sum(size for kind, (size, _) in kinds.items() if kind != "NF4")
        lines.append(f"{group}: {' and '.join(parts)}" + (f"; {_short(left)} left unquantized" if "NF4" in kinds else ""))
    return lines


def base_variables(model: Model) -> Iterator[tuple[str, nnx.Variable]]:
    """Dotted path and variable of every weight of the base, once each; adapters left out."""
    seen = dict.fromkeys((place.path, place.attr) for places in tensors(model.config).values() for place in places)
    for path, attr in seen:
        yield ".".join((*path, attr)), getattr(attribute(model, path), attr)


def _group(name: str) -> str:
    for key, group in (("router", "router"), ("moe.w", "experts"), ("norm", "norms"), ("attention.", "attention"), ("mamba.", "mamba")):
        if key in name:
            return group
    return name.split(".")[0]


def _short(count: int) -> str:
    for size, letter in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)


def _size(nbytes: int) -> str:
    unit, name = next((u, name) for u, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")) if nbytes >= u or u == 1.0)
    return f"{nbytes / unit:.3g} {name}"


def _leaf_name(path: Any) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


_LAYOUTS = {
    ".qweight": "a GPTQ or AWQ checkpoint",
    ".weight_scale": "an 8-bit checkpoint",
}


def _hint(names: list[str]) -> str:
    """What kind of checkpoint tensors of such names are from, where it is known."""
    kind = next((what for part, what in _LAYOUTS.items() if any(part in name for name in names)), None)
    return "" if kind is None else f": {kind}, which is not read here (give the original model: bf16, fp16 or fp32, one matrix per expert)"


def _refuse_unknown(files: Any, places: Any, config: Architecture, folder: Path) -> None:
    unknown = sorted(name for name in files if name not in places and not name.endswith("inv_freq"))
    if config.tie_word_embeddings:
        unknown = [name for name in unknown if name not in ("lm_head.weight", "output_layer.weight")]
    if unknown:
        raise UserError(
            f"{folder}: {len(unknown)} tensors have no place in a {_describe(config)}, first {unknown[0]!r}{_hint(unknown)}"
        )


def _cache_path(cache: Path, folder: Path, leaves: dict[str, Any], settings: str) -> Path:
    return cache / f"{quantized_cache.key(weight_files(folder), leaves, settings)}.safetensors"


def _progress(console: Console | None) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=console is None)


def _fill(
    variable: str, abstract: Any, parts: list[tuple[str, Place]], files: dict[str, Any], folder: Path, keep: Keeper, advance: Any
) -> Any:
    """The stacked value [L, (E,) …] of one variable, from its tensors in order of layer and expert."""
    quantized = isinstance(abstract, nf4.NF4Tensor)
    flat, treedef = jax.tree_util.tree_flatten_with_path(abstract)
    names = [".".join(filter(None, (variable, _leaf_name(path)))) for path, _ in flat]
    buffers: list[Any] = [None if parts[0][1].layer is None else jnp.zeros(leaf.shape, leaf.dtype) for _, leaf in flat]
    for name, place in parts:
        shape = abstract.shape if quantized else abstract.shape[abstract.ndim - _rank(place, abstract.ndim) :]
        value = _read(files, name, place, shape, folder)
        if quantized and not isinstance(value, nf4.NF4Tensor):
            value = nf4.quantize(value, double=abstract.offset is not None)
        stored = value if quantized else value.astype(abstract.dtype)
        index = tuple(i for i in (place.layer, place.expert) if i is not None)
        position = tuple(jnp.int32(i) for i in index)
        for i, leaf in enumerate(jax.tree.leaves(stored)):
            keep.put(names[i], leaf, index)
            # A copy: on a CPU `leaf` may be a view of the file, and would change with it.
            buffers[i] = quantized_cache.put(buffers[i], leaf, position) if index else jnp.array(leaf, copy=True)
        # What was read must be done with before its pages are given back, and before more is queued than memory holds.
        jax.block_until_ready(buffers)
        files[name].release()
        advance(files[name].nbytes // (2 if place.half is not None else 1))
    return jax.tree.unflatten(treedef, buffers)


def _rank(place: Place, ndim: int) -> int:
    """Dimensions of one tensor without its layer and expert axes."""
    return ndim - (place.layer is not None) - (place.expert is not None)


def index_of(place: Place) -> Any:
    """The index of one tensor in its stacked variable."""
    return tuple(i for i in (place.layer, place.expert) if i is not None) or ...


def _read(files: dict[str, Any], name: str, place: Place, shape: tuple[int, ...], folder: Path) -> Any:
    half = None if place.half is None else slice(place.half * shape[0], (place.half + 1) * shape[0])
    value = read_tensor(files, name, stored_shape(place, tuple(shape)), folder, half)
    return value if isinstance(value, nf4.NF4Tensor) else value.reshape(shape)


def read_tensor(files: dict[str, Any], name: str, shape: tuple[int, ...], folder: Path, rows: slice | None = None) -> Any:
    """One tensor of a checkpoint (or some rows of it), as stored: an array, or an `NF4Tensor` where bitsandbytes quantized it.

    Raises UserError where it is missing, of another shape or no number.
    """
    if name not in files:
        raise UserError(f"{folder}: tensor {name!r} is missing")
    raw, where = files[name].read(), files[name].file.path
    if tuple(raw.shape) != shape:
        raise UserError(f"{where}: tensor {name!r} has shape {list(raw.shape)}, expected {list(shape)}")
    if isinstance(raw, nf4.NF4Tensor):
        return raw
    if raw.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise UserError(f"{where}: tensor {name!r} is {raw.dtype}: expected bfloat16, float16 or float32")
    value = jnp.asarray(raw if rows is None else raw[rows])
    if not bool(_all_finite(value)):
        raise UserError(f"{where}: tensor {name!r} holds NaN or infinity")
    return value


@jax.jit
def _all_finite(value: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(value))


def stored_shape(place: Place, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A checkpoint's shape of a tensor that is `shape` here: twice the rows for two halves; torch's depthwise kernel is [D, 1, K]."""
    if place.path[-1] == "conv" and place.attr == "weight":
        return (shape[0], 1, shape[1])
    return (2 * shape[0], *shape[1:]) if place.half is not None else shape


def _describe(config: Architecture) -> str:
    kind = type(config).__name__.removesuffix("Config")
    return f"{kind} of {config.num_layers} layers and {config.num_experts} experts"


def attribute(model: Any, path: tuple[str, ...]) -> Any:
    """The module at a path of attributes."""
    for name in path:
        model = getattr(model, name)
    return model


def variables(model: Model) -> Iterator[tuple[str, nnx.Variable]]:
    """Dotted path and variable of every weight, adapters included."""
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        yield ".".join(str(p) for p in path), variable
