"""Whole models in Hub layout: read into a model (quantized tensor by tensor), and written from one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from models.build import Model, materialize_lora
from models.config import Architecture, MixtralConfig, from_hub_config
from models.ops import nf4
from moejax.errors import UserError
from moejax.hub.names import Place, tensors
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


def load_weights(model: Model, folder: Path, lora_key: jax.Array) -> Model:
    """Fill an abstract model (`models.build.build` without a key) from a folder's safetensors or .bin; adapters from `lora_key`.

    One tensor at a time: read by memory map, cast or quantized (each expert's matrix by itself), stacked. Raises UserError naming
    file and tensor where one is missing, has another shape, holds NaN, or has no place in this architecture.
    """
    places = tensors(model.config)
    with ExitStack() as stack:
        files = open_tensors(folder, stack)
        unknown = sorted(name for name in files if name not in places and not name.endswith("inv_freq"))
        if model.config.tie_word_embeddings:
            unknown = [name for name in unknown if name not in ("lm_head.weight", "output_layer.weight")]
        if unknown:
            raise UserError(
                f"{folder}: {len(unknown)} tensors have no place in a {_describe(model.config)}, first {unknown[0]!r}{_hint(unknown)}"
            )
        by_variable: dict[tuple[tuple[str, ...], str], list[tuple[str, Place]]] = {}
        for name, several in places.items():
            for place in several:
                by_variable.setdefault((place.path, place.attr), []).append((name, place))
        for (path, attr), parts in by_variable.items():
            variable = getattr(attribute(model, path), attr)
            variable.set_value(_fill(variable.get_value(), parts, files, folder))
    return materialize_lora(model, lora_key)


_LAYOUTS = {
    ".quant_state.": "a checkpoint that bitsandbytes quantized",
    ".absmax": "a checkpoint that bitsandbytes quantized",
    ".qweight": "a GPTQ or AWQ checkpoint",
    ".weight_scale": "an 8-bit checkpoint",
    ".gate_up_proj": "a checkpoint whose experts lie in one tensor",
}


def _hint(names: list[str]) -> str:
    """What kind of checkpoint tensors of such names are from, where it is known."""
    kind = next((what for part, what in _LAYOUTS.items() if any(part in name for name in names)), None)
    return "" if kind is None else f": {kind}, which is not read here (give the original model: bf16, fp16 or fp32, one matrix per expert)"


def open_tensors(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """tensor name -> open safetensors (or .bin) file. Raises UserError where one is missing, cut, or not what the index says."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if not (folder / "model.safetensors").is_file() and (folder / "pytorch_model.bin").is_file():
            torch_file = stack.enter_context(TorchFile(folder / "pytorch_model.bin"))
            return dict.fromkeys(torch_file.keys(), torch_file)
        file = _open_file(folder, "model.safetensors", " (or a pytorch_model.bin, or an index and its shards)", stack)
        return dict.fromkeys(file.keys(), file)
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(f, str) for f in where.values()):
        raise UserError(f"{index} lacks weight_map: expected the file of every tensor in it")
    files: dict[str, Any] = {}
    for shard in sorted(set(where.values())):
        if Path(shard).name != shard:
            raise UserError(f"{index} names a file {shard!r}: expected files of the same folder")
        file = _open_file(folder, shard, ", which its index names", stack)
        for name in file.keys():  # noqa: SIM118 (no mapping)
            if where.get(name, shard) == shard:
                files[name] = file
    lost = sorted(where.keys() - files.keys())
    if lost:
        raise UserError(
            f"{folder}: {where[lost[0]]} lacks tensor {lost[0]!r}, which the index says it holds ({len(lost)} such): download it again"
        )
    return files


def _open_file(folder: Path, name: str, why: str, stack: ExitStack) -> Any:
    path = folder / name
    if not path.is_file():
        raise UserError(f"{folder} lacks {name}{why}")
    try:
        return stack.enter_context(safe_open(str(path), framework="flax"))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no whole safetensors file ({error}): download it again") from None


def _fill(abstract: Any, parts: list[tuple[str, Place]], files: dict[str, Any], folder: Path) -> Any:
    """The stacked value [L, (E,) …] of one variable, from its tensors in order of layer and expert."""
    if not isinstance(abstract, nf4.NF4Tensor):
        leading = abstract.shape[: abstract.ndim - _rank(parts[0][1], abstract.ndim)]
        shape = abstract.shape[len(leading) :]
        buffer = np.empty(abstract.shape, _numpy_dtype(abstract.dtype))
        for name, place in parts:
            buffer[index_of(place)] = np.asarray(_read(files, name, place, shape, folder).astype(abstract.dtype))
        return jnp.asarray(buffer)
    double = abstract.offset is not None
    buffers = jax.tree.map(lambda leaf: np.empty(leaf.shape, _numpy_dtype(leaf.dtype)), abstract)
    for name, place in parts:
        codes = nf4.quantize(_read(files, name, place, abstract.shape, folder), double=double)
        for buffer, leaf in zip(jax.tree.leaves(buffers), jax.tree.leaves(codes), strict=True):
            buffer[index_of(place)] = np.asarray(leaf)
    return jax.tree.map(jnp.asarray, buffers)


def _rank(place: Place, ndim: int) -> int:
    """Dimensions of one tensor without its layer and expert axes."""
    return ndim - (place.layer is not None) - (place.expert is not None)


def index_of(place: Place) -> Any:
    """The index of one tensor in its stacked variable."""
    return tuple(i for i in (place.layer, place.expert) if i is not None) or ...


def _numpy_dtype(dtype: Any) -> Any:
    return ml_dtypes.bfloat16 if dtype == jnp.bfloat16 else np.dtype(dtype)


def _read(files: dict[str, Any], name: str, place: Place, shape: tuple[int, ...], folder: Path) -> jax.Array:
    value = read_tensor(files, name, stored_shape(place, tuple(shape)), folder)
    if place.half is not None:
        value = value[place.half * shape[0] : (place.half + 1) * shape[0]]
    return value.reshape(shape)


def read_tensor(files: dict[str, Any], name: str, shape: tuple[int, ...], folder: Path) -> jax.Array:
    """One tensor of a checkpoint, as stored. Raises UserError where it is missing, cannot be read, has another
    shape or dtype, or is not finite.
    """
    if name not in files:
        raise UserError(f"{folder}: tensor {name!r} is missing")
    try:
        value: jax.Array = files[name].get_tensor(name)
    except SafetensorError as error:
        raise UserError(f"{folder}: tensor {name!r} cannot be read ({error})") from None
    if value.shape != shape:
        raise UserError(f"{folder}: tensor {name!r} has shape {list(value.shape)}, expected {list(shape)}")
    if value.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise UserError(f"{folder}: tensor {name!r} is {value.dtype}: expected bfloat16, float16 or float32")
    if not bool(jnp.all(jnp.isfinite(value))):
        raise UserError(f"{folder}: tensor {name!r} holds NaN or infinity")
    return value


def stored_shape(place: Place, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A checkpoint's shape of a tensor that is `shape` here: twice the rows for two halves; torch's depthwise kernel is [D, 1, K]."""
    if place.path[-1] == "conv" and place.attr == "weight":
        return (shape[0], 1, shape[1])
    return (2 * shape[0], *shape[1:]) if place.half is not None else shape


def _describe(config: Architecture) -> str:
    kind = type(config).__name__.removesuffix("Config")
    return f"{kind} of {config.num_layers} layers and {config.num_experts} experts"


def save_weights(model: Model, folder: Path, dtype: Any = jnp.bfloat16) -> None:
    """Write an unquantized model in Hub layout (config.json, generation_config.json, model.safetensors), adapters left out.

    The file is written aside and renamed: a half-written one is never taken for a whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for name, places in tensors(model.config).items():
        parts = []
        for place in places:
            value = getattr(attribute(model, place.path), place.attr).get_value()
            if isinstance(value, nf4.NF4Tensor):
                raise UserError(f"{'.'.join(place.path)} is quantized: only a full-precision model can be written whole")
            parts.append(np.asarray(value[index_of(place)].astype(dtype)))
        array = parts[0] if len(parts) == 1 else np.concatenate(parts)
        arrays[name] = array[:, None] if name.endswith("conv1d.weight") else array
    aside = folder / "model.safetensors.tmp"
    save_file(arrays, str(aside), metadata={"format": "pt"})
    aside.replace(folder / "model.safetensors")
    write_config(model.config, folder, dtype)


def write_config(c: Architecture, folder: Path, dtype: Any) -> None:
    """config.json and generation_config.json of a model whose weights are stored in `dtype`."""
    hub_config = c.to_hub_config()
    if isinstance(c, MixtralConfig):  # transformers has no class for a BlackMamba
        hub_config |= {"torch_dtype": str(jnp.dtype(dtype)), "transformers_version": "4.57.6"}
    _write_json(folder / "config.json", hub_config)
    generation = {"_from_model_config": True, "bos_token_id": c.bos_token_id, "eos_token_id": c.eos_token_id}
    _write_json(folder / "generation_config.json", generation)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    aside.replace(path)


def attribute(model: Any, path: tuple[str, ...]) -> Any:
    """The module at a path of attributes."""
    for name in path:
        model = getattr(model, name)
    return model


def variables(model: Model) -> Iterator[tuple[str, nnx.Variable]]:
    """Dotted path and variable of every weight, adapters included."""
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        yield ".".join(str(p) for p in path), variable
