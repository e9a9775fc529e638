"""Whole models in Hub layout, read into a model, quantized tensor by tensor. `save` writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from models.build import Model, materialize_lora
from models.config import Architecture, from_hub_config
from models.ops import nf4
from moejax.errors import UserError
from moejax.hub import quantized_cache
from moejax.hub.names import Place, tensors
from moejax.hub.quantized_cache import Keeper
from moejax.hub.safetensors_file import Reader
from moejax.hub.torch_file import TorchFile

_DOWNLOAD = ("*.json", "*.safetensors", "tokenizer*", "*.jinja")


def resolve(source: str, revision: str | None = None, field: str = "model.source") -> Path:
    """The folder of a model or adapter: `source` itself, or the Hub's snapshot of that id (downloaded where it is not cached).

    field: where the config names it, for messages. Raises UserError where neither is there.
    """
    if Path(source).is_dir():
        return Path(source)
    if source.startswith((".", "/")) or source.count("/") != 1:
        raise UserError(
            f"{field} = {source!r}: no such folder (expected a folder in Hub layout, or a Hub id like org/name)"
        )
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=list(_DOWNLOAD)))
        if not any(folder.glob("*.safetensors")):  # BlackMamba's checkpoints are PyTorch's
            folder = Path(snapshot_download(source, revision=revision, allow_patterns=[*_DOWNLOAD, "pytorch_model.bin"]))
        return folder
    except Exception as error:
        raise UserError(
            f"{field} = {source!r} is no local folder, and the Hub could not be asked ({type(error).__name__}: "
            f"{str(error).splitlines()[0][:200]}). Check the id and the network, or give a folder"
        ) from error


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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError naming the file where it cannot be read or is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}: expected names and values")
    return content


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
        quantized = any(isinstance(value, nf4.NF4Tensor) for value in abstract.values())
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
    return sum(path.stat().st_size for path in _files(folder) if path.is_file())


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
    ".quant_state.": "a checkpoint that bitsandbytes quantized",
    ".absmax": "a checkpoint that bitsandbytes quantized",
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


class _Source(NamedTuple):
    """Where a tensor is read: a file's tensor, or one expert's rows of a fused one."""

    file: Any
    name: str
    nbytes: int
    expert: int | None = None
    rows: slice = slice(None)

    def read(self) -> Any:
        value = self.file.get_tensor(self.name)
        return value if self.expert is None else value[self.expert, self.rows]

    def release(self) -> None:
        if isinstance(self.file, Reader):
            self.file.release(self.name)


_FUSED = re.compile(r"(model\.layers\.\d+)\.mlp\.(?:experts\.(gate_up_proj|down_proj)|(gate)\.weight)$")


def open_tensors(folder: Path, stack: ExitStack) -> dict[str, _Source]:
    """tensor name -> where it is read. Fused expert tensors appear under their experts' names. Raises UserError naming the file."""
    shards = _shards(folder)
    if not shards and (folder / "pytorch_model.bin").is_file():
        torch_file = stack.enter_context(TorchFile(folder / "pytorch_model.bin"))
        names = torch_file.keys()
        return {name: _Source(torch_file, name, torch_file.nbytes(name)) for name in names}
    found: dict[str, _Source] = {}
    where = _weight_map(folder)
    held: set[str] = set()
    for path in shards or [folder / "model.safetensors"]:
        if not path.is_file():
            raise UserError(
                f"{folder} lacks {path.name}"
                + (", which its index names" if where else " (or a pytorch_model.bin, or an index and its shards)")
            )
        file = Reader(path)
        for name in file.names():
            if where.get(name, path.name) == path.name:
                held.add(name)
                found |= _expanded(file, name)
    lost = sorted(where.keys() - held)
    if lost:
        raise UserError(
            f"{folder}: {where[lost[0]]} lacks tensor {lost[0]!r}, which the index says it holds ({len(lost)} such): download it again"
        )
    return found


def _expanded(file: Reader, name: str) -> dict[str, _Source]:
    """The tensors of one expert each that a file's tensor holds; itself where it is not fused."""
    match = _FUSED.match(name)
    if not match:
        return {name: _Source(file, name, file.nbytes(name))}
    layer, fused, gate = match.groups()
    block = f"{layer}.block_sparse_moe"
    if gate:
        return {f"{block}.gate.weight": _Source(file, name, file.nbytes(name))}
    shape = file.shape(name)
    if len(shape) != 3 or (fused == "gate_up_proj" and shape[1] % 2):
        raise UserError(f"{file.path}: tensor {name!r} has shape {list(shape)}, expected [experts, rows, columns]")
    half = shape[1] // 2
    parts = {"w1": slice(0, half), "w3": slice(half, None)} if fused == "gate_up_proj" else {"w2": slice(None)}
    size = file.nbytes(name) // (shape[0] * len(parts))
    return {
        f"{block}.experts.{e}.{w}.weight": _Source(file, name, size, e, rows) for e in range(shape[0]) for w, rows in parts.items()
    }


_INDEX = "model.safetensors.index.json"


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file, as the folder's index has it; empty without one."""
    index = folder / _INDEX
    if not index.is_file():
        return {}
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(f, str) for f in where.values()):
        raise UserError(f"{index} lacks weight_map: expected the file of every tensor in it")
    for shard in sorted(set(where.values())):
        if Path(shard).name != shard:
            raise UserError(f"{index} names a file {shard!r}: expected files of the same folder")
    return where


def _shards(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those its index names, or the single one."""
    named = sorted(set(_weight_map(folder).values()))
    if named:
        return [folder / name for name in named]
    return [folder / "model.safetensors"] if (folder / "model.safetensors").is_file() else []


def _files(folder: Path) -> list[Path]:
    return _shards(folder) or [folder / "pytorch_model.bin"]


def _cache_path(cache: Path, folder: Path, leaves: dict[str, Any], settings: str) -> Path:
    return cache / f"{quantized_cache.key(_files(folder), leaves, settings)}.safetensors"


def _progress(console: Console | None) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=console is None)


def _fill(
    variable: str, abstract: Any, parts: list[tuple[str, Place]], files: dict[str, _Source], folder: Path, keep: Keeper, advance: Any
) -> Any:
    """The stacked value [L, (E,) …] of one variable, from its tensors in order of layer and expert."""
    quantized = isinstance(abstract, nf4.NF4Tensor)
    flat, treedef = jax.tree_util.tree_flatten_with_path(abstract)
    names = [".".join(filter(None, (variable, _leaf_name(path)))) for path, _ in flat]
    buffers: list[Any] = [None if parts[0][1].layer is None else jnp.zeros(leaf.shape, leaf.dtype) for _, leaf in flat]
    for name, place in parts:
        shape = abstract.shape if quantized else abstract.shape[abstract.ndim - _rank(place, abstract.ndim) :]
        value = _read(files, name, place, shape, folder)
        stored = nf4.quantize(value, double=abstract.offset is not None) if quantized else value.astype(abstract.dtype)
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


def _read(files: dict[str, _Source], name: str, place: Place, shape: tuple[int, ...], folder: Path) -> jax.Array:
    half = None if place.half is None else slice(place.half * shape[0], (place.half + 1) * shape[0])
    return read_tensor(files, name, stored_shape(place, tuple(shape)), folder, half).reshape(shape)


def read_tensor(
    files: dict[str, _Source], name: str, shape: tuple[int, ...], folder: Path, rows: slice | None = None
) -> jax.Array:
    """One tensor of a checkpoint (or some rows of it), as stored. Raises UserError where it is missing, of another shape or no number."""
    if name not in files:
        raise UserError(f"{folder}: tensor {name!r} is missing")
    raw, where = files[name].read(), files[name].file.path
    if tuple(raw.shape) != shape:
        raise UserError(f"{where}: tensor {name!r} has shape {list(raw.shape)}, expected {list(shape)}")
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
