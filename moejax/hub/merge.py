"""A run's weights as one bf16 model: base and adapter merged tensor by tensor, written as shards with an index."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from moejax.hub.names import attribute, index_of, tensors
from moejax.hub.peft import variables
from moejax.hub.safetensors_file import Writer
from moejax.hub.save import write_config, write_json
from moejax.hub.stored import open_tensors
from moejax.hub.streaming import read_tensor, whole_shape
from moejax.models.build import Model
from moejax.models.ops.quantized import Canonical, QuantizedTensor, encode

SHARD_BYTES = 2_000_000_000


def save_merged(
    model: Model, base: Path, folder: Path, *, shard_bytes: int = SHARD_BYTES, progress: Callable[[int], None] | None = None
) -> int:
    """Write base + alpha/rank · B A of every adapted matrix, in bf16, with config.json and generation_config.json. Returns its bytes.

    model: abstract but for its adapters (`moejax.models.build.build` without a key, `peft.load_adapter`); it says what is quantized. A
    quantized matrix is merged as it was trained against: to 4 bits and back, then the adapter's part, in fp32, then rounded once.
    base: the folder its weights are read from. Host memory holds one tensor. progress: called with the bytes of each. Raises UserError as
    `weights.load_weights` does, and for a full disk.
    """
    sizes = {name: 2 * math.prod(whole_shape(model, places)) for name, places in tensors(model.config).items()}
    shards = plan_shards(sizes, shard_bytes)
    files = [
        "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {name: (whole_shape(model, places), ml_dtypes.bfloat16) for name, places in tensors(model.config).items()}
    with ExitStack() as stack:
        source = open_tensors(base, stack, model.config)
        for file, names in zip(files, shards, strict=True):
            with Writer(folder / file, {name: shapes[name] for name in names}, {"format": "pt"}) as writer:
                for name in names:
                    writer.write(name, merged_tensor(model, name, source, base).astype(ml_dtypes.bfloat16))
                    source[name].release()
                    if progress is not None:
                        progress(sizes[name])
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
        }
        write_json(folder / "model.safetensors.index.json", index)
    write_config(model.config, folder, jnp.bfloat16)
    return sum(sizes.values())


def plan_shards(sizes: dict[str, int], shard_bytes: int) -> list[list[str]]:
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


def merged_tensor(model: Model, name: str, files: dict[str, Any], base: Path) -> np.ndarray:
    """fp32: a tensor of the checkpoint as the trained model means it, adapter included."""
    places = tensors(model.config)[name]
    raw = read_tensor(files, name, whole_shape(model, places), base)
    place = places[0]  # a tensor that holds two of our matrices is a BlackMamba's: neither quantized nor adapted
    module = attribute(model, place.path)
    held = getattr(module, place.attr).get_value()
    if isinstance(held, QuantizedTensor) and not isinstance(raw, Canonical):
        raw = encode(held.kind, raw)
    if isinstance(raw, Canonical):
        raw = raw.tensor().dequantize(jnp.float32)
    value = np.asarray(raw, np.float32)
    lora = getattr(module, "lora", None) if place.attr == "weight" else None
    if lora is None:
        return value
    a, b = (np.asarray(v.get_value()[index_of(place)], np.float32) for v in variables(model, place, lora).values())
    return value + np.float32(lora.scale) * (b @ a)
