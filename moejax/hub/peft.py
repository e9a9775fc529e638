"""Adapters in PEFT's per-expert format (transformers 4, PEFT 0.18), which PEFT 0.21 on transformers 5 reads as well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from models.build import Model
from models.lora import LoRA
from moejax.errors import UserError
from moejax.hub.names import Place, module_names
from moejax.hub.weights import attribute

_PREFIX = "base_model.model."
_OUR_NAMES = {"router": "gate"}


def adapted(model: Model) -> dict[str, tuple[Place, LoRA]]:
    """Hub module name -> its place and the (stacked) adapter that holds its pair."""
    found = {}
    for name, place in module_names(model.config).items():
        lora = getattr(attribute(model, place.path), "lora", None)
        if lora is not None:
            found[name] = (place, lora)
    return found


def save_adapter(model: Model, folder: Path, base_name: str, revision: str | None = None) -> None:
    """Write adapter_model.safetensors and adapter_config.json, aside and renamed; then read them back and compare to the bit."""
    pairs = adapted(model)
    tensors = {}
    for name, (place, lora) in pairs.items():
        index = (place.layer,) if place.expert is None else (place.layer, place.expert)
        for letter, variable in (("A", lora.a), ("B", lora.b)):
            tensors[f"{_PREFIX}{name}.lora_{letter}.weight"] = np.ascontiguousarray(variable.get_value()[index])
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / "adapter_model.safetensors.tmp"
    save_file(tensors, str(aside), metadata={"format": "pt"})
    written = load_file(str(aside))
    if written.keys() != tensors.keys() or any(not np.array_equal(written[k], tensors[k]) for k in tensors):
        raise UserError(f"{aside} reads back differently from what was written: a full or failing disk?")
    aside.replace(folder / "adapter_model.safetensors")
    lora = next(iter(pairs.values()))[1]
    targets = sorted({_OUR_NAMES.get(place.path[-1], place.path[-1]) for place, _ in pairs.values()})
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": revision,
        "inference_mode": True,
        "r": lora.a.get_value().shape[-2],
        "lora_alpha": lora.scale * lora.a.get_value().shape[-2],
        "lora_dropout": lora.dropout,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
    }
    config_aside = folder / "adapter_config.json.tmp"
    config_aside.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    config_aside.replace(folder / "adapter_config.json")


def load_adapter(model: Model, folder: Path) -> None:
    """Read an adapter into the model's LoRA weights, exactly. Raises UserError where rank, targets or tensors disagree."""
    config = read_adapter_config(folder)
    path = folder / "adapter_model.safetensors"
    try:
        tensors = load_file(str(path))
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    buffers: dict[int, tuple[LoRA, np.ndarray, np.ndarray]] = {}
    for name, (place, lora) in adapted(model).items():
        a, b = lora.a.get_value(), lora.b.get_value()
        if a.shape[-2] != config["r"] or abs(lora.scale * config["r"] - config["lora_alpha"]) > 1e-6:
            raise UserError(
                f"{folder}: rank {config['r']}, alpha {config['lora_alpha']}; the model's adapter has rank {a.shape[-2]}, "
                f"alpha {lora.scale * a.shape[-2]:g}: set adapter.rank and adapter.alpha to the adapter's"
            )
        _, into_a, into_b = buffers.setdefault(id(lora), (lora, np.empty(a.shape, a.dtype), np.empty(b.shape, b.dtype)))
        index = (place.layer,) if place.expert is None else (place.layer, place.expert)
        for letter, buffer in (("A", into_a), ("B", into_b)):
            buffer[index] = _take(tensors, f"{_PREFIX}{name}.lora_{letter}.weight", buffer[index].shape, path)
    if tensors:
        raise UserError(f"{path}: {len(tensors)} tensors have no place in this model's adapter, first {next(iter(tensors))!r}")
    for lora, into_a, into_b in buffers.values():
        lora.a.set_value(jnp.asarray(into_a))
        lora.b.set_value(jnp.asarray(into_b))


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter's configuration. Raises UserError where the folder holds none."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no adapter_config.json: expected an adapter written by PEFT or by moejax")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def _take(tensors: dict[str, np.ndarray], name: str, shape: tuple[int, ...], path: Path) -> np.ndarray:
    if name not in tensors:
        raise UserError(f"{path}: tensor {name!r} is missing: the adapter has other targets than the model's")
    value = tensors.pop(name)
    if value.shape != shape:
        raise UserError(f"{path}: tensor {name!r} has shape {list(value.shape)}, expected {list(shape)}: another base model?")
    return value
