"""A run's weights as one bf16 model: base and adapter merged tensor by tensor, written as shards with an index."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from moejax.hub.names import attribute, index_of, tensors
from moejax.hub.peft import variables
from moejax.hub.save import write_model
from moejax.hub.stored import open_tensors
from moejax.hub.streaming import read_tensor
from moejax.models.build import Model
from moejax.models.ops.quantized import Canonical, QuantizedTensor, encode

SHARD_BYTES = 2_000_000_000


def save_merged(
    model: Model, base: Path, folder: Path, *, shard_bytes: int = SHARD_BYTES, progress: Callable[[int], None] = lambda nbytes: None
) -> int:
    """Write base + alpha/rank · B A of every adapted matrix, in bf16, with config.json and generation_config.json. Returns its bytes.

    model: abstract but for its adapters (`moejax.models.build.build` without a key, `peft.load_adapter`); it says what is quantized. A
    quantized matrix is merged as it was trained against: to 4 bits and back, then the adapter's part, in fp32, then rounded once.
    base: the folder its weights are read from. Host memory holds one tensor. progress: called with the bytes of each. Raises UserError as
    `weights.load_weights` does, and for a full disk.
    """
    with opened(model, base) as value:
        return write_model(model, folder, value, jnp.bfloat16, shard_bytes=shard_bytes, progress=progress)


@contextmanager
def opened(model: Model, base: Path) -> Iterator[Callable[[str], np.ndarray]]:
    """`merged_tensor` of the tensors in the folder `base`, by name."""
    with ExitStack() as stack:
        source = open_tensors(base, stack, model.config)
        yield lambda name: merged_tensor(model, name, source, base)


def merged_tensor(model: Model, name: str, files: dict[str, Any], base: Path) -> np.ndarray:
    """fp32: a tensor of the checkpoint as the trained model means it, adapter included."""
    places = tensors(model.config)[name]
    raw = read_tensor(files, name, model, base)
    place = places[0]  # a tensor that holds two of our matrices is a BlackMamba's: neither quantized nor adapted
    module = attribute(model, place.path)
    held = getattr(module, place.attr).get_value()
    if isinstance(held, QuantizedTensor) and not isinstance(raw, Canonical):
        raw = encode(held.kind, raw)
    if isinstance(raw, Canonical):
        raw = raw.tensor().dequantize(jnp.float32)
    value = np.asarray(raw, np.float32)
    rows = getattr(model, f"{place.path[0]}_rows", None) if place.layer is None else None
    if rows is not None:
        return rows.within(value)
    lora = getattr(module, "lora", None) if place.attr == "weight" else None
    if lora is None:
        return value
    a, b = (np.asarray(v.get_value()[index_of(place)], np.float32) for v in variables(model, place, lora).values())
    return value + np.float32(lora.scale) * (b @ a)
