"""Whole models in Hub layout, read into a model, quantized tensor by tensor. `save` writes them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from moejax import processes
from moejax.contents import sizes_content
from moejax.documents import read_json
from moejax.errors import UserError
from moejax.hub import bitsandbytes, mxfp4, quantized_cache
from moejax.hub.names import attribute, index_of, tensors, whole_of
from moejax.hub.quantized_cache import Content, Keeper
from moejax.hub.snapshot import resolve
from moejax.hub.stored import AGAIN, MADE_FROM, open_tensors, weight_files
from moejax.hub.streaming import by_variable, checked, fill, leading, new_rows, whole_shape
from moejax.models.build import Model, materialize_lora
from moejax.models.config import Architecture, from_hub_config
from moejax.models.ops.quantized import is_quantized, storage
from moejax.models.ops.split import whole
from moejax.progress import bar, say

__all__ = ["attribute", "index_of", "load_weights", "open_tensors", "read_config", "report", "resolve"]


def read_config(folder: Path, ignored: Collection[str] = ()) -> Architecture:
    """The architecture in the folder's config.json. ignored: as in `from_hub_config`. Raises UserError naming the file."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no config.json: expected a model in Hub layout{_instead(folder)}")
    content = read_json(path, remedy=AGAIN)
    try:
        return from_hub_config(content, ignored)
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path}: {what}") from None


def _instead(folder: Path) -> str:
    """What a folder is that is no model, where that is known."""
    if (folder / "adapter_config.json").is_file():
        return ", and this is an adapter: give its base model here, and the adapter as adapter.init_from"
    if (folder / "model" / "config.json").is_file():
        return f", and this is the folder of a run: its model is {folder / 'model'}"
    if (folder / "adapter" / "adapter_config.json").is_file():
        return f", and this is the folder of a run: its adapter is {folder / 'adapter'}, for adapter.init_from"
    return ""


def load_weights(
    model: Model, folder: Path, lora_key: jax.Array, *, cache: Path | None = None, content: Content | None = None
) -> Model:
    """Fill an abstract model (`moejax.models.build.build` without a key) from a folder's safetensors or .bin; adapters from `lora_key`.

    One tensor at a time: read, cast or quantized (each expert's matrix by itself), put into its place on the device,
    so that the host never holds more than a few tensors. cache: the folder that keeps quantized weights for the next start
    (`quantized_cache`). content: takes the weights' hash. Raises UserError naming file and tensor where
    one is missing, has another shape, holds NaN, or has no place in this architecture.
    """
    abstract = {".".join((*path, attr)): getattr(attribute(model, path), attr).get_value() for path, attr in by_variable(model)}
    leaves = quantized_cache.leaves_of(abstract)
    with ExitStack() as stack:
        files = open_tensors(folder, stack, model.config)
        check_names(files, model, folder)
        if beyond := [name for name in files if name.startswith(model.config.names.beyond)]:
            say(f"{folder}: {len(beyond)} tensors behind the last layer, which predict further tokens, are not read, first {beyond[0]}")
        path = None
        # As small, and as fast to read.
        ready = any(isinstance(source, bitsandbytes.Quantized | mxfp4.Matrix) for source in files.values())
        if cache is not None and not ready and any(is_quantized(whole(value)) for value in abstract.values()):
            path = cache / f"{quantized_cache.key(weight_files(folder), leaves, repr(model.config))}.safetensors"
        stacked = {".".join((*path, attr)): leading(parts[0][1]) for (path, attr), parts in by_variable(model).items()}
        kept = None if path is None else quantized_cache.read(path, abstract, content, stacked)
        if kept:
            for name, variable in base_variables(model):
                variable.set_value(kept[name])
        else:
            # Several processes read one cache, and the first writes it.
            keep = stack.enter_context(Keeper(path if processes.is_first() and kept is None else None, leaves, content, stacked))
            total = sum(files[n].nbytes // len(p) for n, p in tensors(model.config).items() if n in files for _ in p)
            advance = stack.enter_context(bar("loading", total, "bytes"))
            read_all = fill(model, files, folder, keep=keep, advance=advance, every=keep.writes)
            if content is not None:
                content.partial = not read_all
    if content is not None:
        content.agree()
    return materialize_lora(model, lora_key)


def check_files(model: Model, folder: Path) -> None:
    """Raises UserError where a folder's files are not whole by their headers, or hold other tensors than the model, or of other
    shapes: without reading any."""
    with ExitStack() as stack:
        files = open_tensors(folder, stack, model.config)
        check_names(files, model, folder)
        for name, places in tensors(model.config).items():
            checked(files, name, whole_shape(model, places), folder, new_rows(model, places[0]))


def files_of(folder: Path) -> str | None:
    """Hash of the names, sizes and index of a folder's weight files; None where one is not there. Of those that it was made from, where
    `hub.shards` made it."""
    made_from, files = folder / MADE_FROM, weight_files(folder)
    if not files or not all(path.is_file() for path in files):
        return None
    if made_from.is_file():
        known: str | None = read_json(made_from, remedy=AGAIN).get("base_files")
        return known
    return sizes_content({path.name: path.stat().st_size for path in files}, sorted(folder.glob("*.index.json")))


def stored_bytes(folder: Path) -> int:
    """Bytes of a folder's weight files, as far as they are there."""
    return sum(path.stat().st_size for path in weight_files(folder) if path.is_file())


def report(model: Model) -> list[str]:
    """What is stored how: a line for each group of weights and dtype, with parameters and bytes (packed codes and scales counted)."""
    found: dict[str, dict[tuple[bool, str], list[int]]] = {}
    for name, variable in base_variables(model):
        value = variable.get_value()
        shapes = whole(value)
        kind = is_quantized(shapes), storage(shapes).partition(",")[0]
        count = found.setdefault(model.config.kind_of(tuple(name.split("."))), {}).setdefault(kind, [0, 0])
        count[0] += shapes.size
        count[1] += sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(value))
    lines = []
    for group, kinds in found.items():
        parts = [f"{_short(size)} parameters, {kind}, {_size(nbytes)}" for (_, kind), (size, nbytes) in kinds.items()]
        left = [size for (quantized, _), (size, _) in kinds.items() if not quantized]
        lines.append(f"{group}: {' and '.join(parts)}" + (f"; {_short(sum(left))} left unquantized" if len(left) < len(kinds) else ""))
    return lines


def base_variables(model: Model) -> Iterator[tuple[str, nnx.Variable]]:
    """Dotted path and variable of every weight of the base, once each; adapters left out."""
    for path, attr in by_variable(model):
        yield ".".join((*path, attr)), getattr(attribute(model, path), attr)


def _short(count: int) -> str:
    for size, letter in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)


def _size(nbytes: int) -> str:
    unit, name = next((u, name) for u, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")) if nbytes >= u or u == 1.0)
    return f"{nbytes / unit:.3g} {name}"


_LAYOUTS = {
    ".qweight": "a GPTQ or AWQ checkpoint",
    ".weight_scale": "an 8-bit checkpoint",
}


def _hint(names: list[str]) -> str:
    """What kind of checkpoint tensors of such names are from, where it is known."""
    kind = next((what for part, what in _LAYOUTS.items() if any(part in name for name in names)), None)
    return "" if kind is None else f": {kind}, which is not read here (give the original model: bf16, fp16 or fp32, one matrix per expert)"


def check_names(files: dict[str, Any], model: Model, folder: Path) -> None:
    """Raises UserError where a tensor has no place in the model, is missing, or is quantized where the model is not, or the other way
    round."""
    config, places = model.config, tensors(model.config)
    passed = (*config.names.beyond, *(config.names.unread if config.tie_word_embeddings else ()))
    unknown = sorted(name for name in files if name not in places and not name.endswith("inv_freq") and not name.startswith(passed))
    if unknown:
        raise UserError(
            f"{folder}: {len(unknown)} tensors have no place in a {config.title} of {config.num_layers} layers and "
            f"{config.num_experts} experts, first {unknown[0]!r}{_hint(unknown)}"
        )
    missing = next((name for name in places if name not in files), None)
    if missing is not None:
        missing = whole_of(config).get(missing, missing)
        raise UserError(f"{folder}: tensor {missing!r} is missing: download the checkpoint again")
    groups = {path: group for group, paths in config.groups.items() for path in paths}
    held = ((n, p.path, whole(getattr(attribute(model, p.path), p.attr).get_value())) for n, ps in places.items() for p in ps)
    wanted = [(name, value, groups.get(path)) for name, path, value in held]
    mxfp4.check(files, ((name, value) for name, value, _ in wanted), config.expert_format)
    bitsandbytes.check(files, wanted)
