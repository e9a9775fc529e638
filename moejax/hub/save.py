"""Whole models written in Hub layout, which `weights` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from moejax.errors import UserError
from moejax.files import replace_text
from moejax.hub.names import attribute, index_of, tensors
from moejax.hub.safetensors_file import write_file
from moejax.models.build import Model
from moejax.models.config import Architecture
from moejax.models.ops.quantized import is_quantized


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
            if is_quantized(value):
                raise UserError(f"{'.'.join(place.path)} is quantized: only a full-precision model can be written whole")
            parts.append(np.asarray(value[index_of(place)].astype(dtype)))
        array = parts[0] if len(parts) == 1 else np.concatenate(parts)
        arrays[name] = array[:, None] if name.endswith("conv1d.weight") else array
    write_file(folder / "model.safetensors", arrays)
    write_config(model.config, folder, dtype)


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
