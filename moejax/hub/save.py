"""Whole models written in Hub layout, which `weights` reads, a tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from moejax.errors import UserError
from moejax.files import replace_text
from moejax.hub.names import Part, attribute, in_and_out, index_of, stacked, tensors
from moejax.hub.safetensors_file import Writer
from moejax.hub.streaming import whole_shape
from moejax.models.build import Model
from moejax.models.config import Architecture
from moejax.models.ops.quantized import is_quantized


def save_weights(model: Model, folder: Path, dtype: Any = jnp.bfloat16) -> None:
    """Write an unquantized model in Hub layout (config.json, generation_config.json, model.safetensors), adapters left out."""
    places = tensors(model.config)

    def value(name: str) -> np.ndarray:
        parts = []
        for place in places[name]:
            held = getattr(attribute(model, place.path), place.attr).get_value()
            if is_quantized(held):
                raise UserError(f"{'.'.join(place.path)} is quantized: only a full-precision model can be written whole")
            parts.append(np.asarray(held[index_of(place)]))
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    write_model(model, folder, value, dtype)


def write_model(
    model: Model, folder: Path, value: Callable[[str], np.ndarray], dtype: Any, *, shard_bytes: float = math.inf,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> int:  # fmt: skip
    """Write `value(name)` of every tensor of the checkpoint as `dtype` (the architecture's buffers as fp32), with an index where there are
    several files, and the configs. Returns the tensors' bytes.

    Each file is written aside and renamed: a half-written one is never taken for a whole. progress: called with the bytes of each tensor.
    Raises UserError for a full disk.
    """
    shapes, value = stored_shapes(model), _with_all_experts(model, value, dtype)
    buffers = {n for n, places in tensors(model.config).items() if (*places[0].path, places[0].attr) in model.config.buffers}
    dtypes = {name: jnp.float32 if name in buffers else dtype for name in shapes}
    sizes = {name: jnp.dtype(dtypes[name]).itemsize * math.prod(shape) for name, shape in shapes.items()}
    shards, files = plan_shards(sizes, shard_bytes), ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    folder.mkdir(parents=True, exist_ok=True)
    for file, names in zip(files, shards, strict=True):
        with Writer(folder / file, {name: (shapes[name], dtypes[name]) for name in names}, {"format": "pt"}, sums=True) as writer:
            for name in names:
                writer.write(name, value(name).astype(dtypes[name]))
                progress(sizes[name])
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
        }
        write_json(folder / "model.safetensors.index.json", index)
    write_config(model.config, folder, dtype)
    return sum(sizes.values())


def stored_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint's files; of a family that has those of all experts in one, that one in their place."""
    shapes = {name: whole_shape(model, places) for name, places in tensors(model.config).items()}
    over_all = _over_all(model)
    owned = {part.name for parts in over_all.values() for part in parts}
    found = {name: shape for name, shape in shapes.items() if name not in owned}
    for name, parts in over_all.items():
        (rows, *columns), halves = shapes[parts[0].name], 1 if parts[0].half is None else 2
        found[name] = (len(parts) // halves, *columns, rows * halves)
    return found


def _over_all(model: Model) -> Mapping[str, tuple[Part, ...]]:
    return stacked(model.config) if in_and_out(model.config) else {}


def _with_all_experts(model: Model, value: Callable[[str], np.ndarray], dtype: Any) -> Callable[[str], np.ndarray]:
    """`value` by the names of `stored_shapes`."""
    over_all = _over_all(model)
    shapes = stored_shapes(model) if over_all else {}

    def made(name: str) -> np.ndarray:
        if name not in over_all:
            return value(name)
        array = np.empty(shapes[name], dtype)
        for part in over_all[name]:
            array[part.expert, ..., part.rows(array.shape[-1])] = value(part.name).T.astype(dtype)
        return array

    return made


def plan_shards(sizes: dict[str, int], shard_bytes: float) -> list[list[str]]:
    """Names in order, cut where a shard would pass `shard_bytes`; a larger tensor is a shard by itself."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_config(c: Architecture, folder: Path, dtype: Any) -> None:
    """config.json and generation_config.json of a model whose weights are stored in `dtype`."""
    hub_config = c.to_hub_config()
    if "architectures" in hub_config:  # transformers has it
        hub_config |= {"torch_dtype": str(jnp.dtype(dtype)), "transformers_version": "4.57.6"}
    write_json(folder / "config.json", hub_config)
    generation = {"_from_model_config": True, "bos_token_id": c.bos_token_id, "eos_token_id": c.eos_token_id}
    write_json(folder / "generation_config.json", generation)


def write_json(path: Path, content: dict[str, Any]) -> None:
    replace_text(path, json.dumps(content, indent=2) + "\n")
