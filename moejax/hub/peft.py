"""Adapters in PEFT's formats: per expert (transformers 4, PEFT 0.18; PEFT 0.21 on transformers 5 reads it as well), or fused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from moejax.documents import read_json
from moejax.errors import UserError
from moejax.files import lfs_pointer, replace_text
from moejax.hub import peft_rows
from moejax.hub.fused import check_patterns, checked, fuse, pair_of, patterns, unfuse
from moejax.hub.names import Place, attribute, in_and_out, index_of, modules, target_of
from moejax.hub.safetensors_file import Summed, write_file
from moejax.hub.stored import AGAIN
from moejax.hub.torch_file import TorchFile
from moejax.models.build import Model
from moejax.models.config.adapters import Pair
from moejax.models.foreign_settings import ANY, uncomputed
from moejax.models.lora import LoRA

_PREFIX = "base_model.model."


def adapted(model: Model) -> dict[str, tuple[Place, LoRA]]:
    """Hub module name -> its place and the (stacked) adapter that holds its pair."""
    found = {}
    for name, place in modules(model.config).items():
        lora = getattr(attribute(model, place.path), "lora", None)
        if lora is not None:
            found[name] = (place, lora)
    return found


def variables(model: Model, place: Place, lora: LoRA) -> dict[str, Any]:
    """"A" and "B" of the adapter on the module at a place -> the variable that holds it for all layers and experts."""
    return {"A": attribute(model, lora.owner(place.path)).lora.a, "B": lora.b}


def _by_target(model: Model) -> dict[str, Pair]:
    loras = {target: attribute(model, paths[0]).lora for target, paths in model.config.targets.items()}
    return {target: lora.pair() for target, lora in loras.items() if lora is not None}


def save_adapter(
    model: Model, folder: Path, base_name: str, revision: str | None = None, fused: bool = False, base: Mapping[str, str] | None = None
) -> None:
    """Write adapter_model.safetensors and adapter_config.json; the weights are read back and compared to the bit before they replace any.

    fused: in the format of transformers 5 with PEFT 0.19 or later, which is the only one of a family whose files hold all experts in one
    tensor. base: what its file says of the base's weights, for `continue_from`. Raises UserError where that cannot hold the adapter.
    """
    pairs = adapted(model)
    tensors = {}
    for name, (place, lora) in pairs.items():
        for letter, variable in variables(model, place, lora).items():
            tensors[f"{_PREFIX}{name}.lora_{letter}.weight"] = np.ascontiguousarray(variable.get_value()[index_of(place)])
    by_target, names = _by_target(model), model.config.target_names
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": revision,
        "inference_mode": True,
        "lora_dropout": next(iter(pairs.values()))[1].dropout,
        "target_modules": sorted(names[target] for target in by_target),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "use_rslora": False,
        "use_dora": False,
    }
    if fused or in_and_out(model.config):
        tensors, config = fuse(tensors, config, model.config, by_target)
    else:
        # transformers 5 has the router as a parameter: gate.weight. What an expert and others have is distinguished by where it stands.
        several = {t: rf"experts\.\d+\.{n}" for t, n in names.items() if any(other.endswith(f".{n}") for other in names.values())}
        not_meant = sorted(n for t, n in names.items() if t not in by_target and n.endswith(tuple(f".{names[own]}" for own in by_target)))
        config |= {"exclude_modules": not_meant} if not_meant else {}
        config |= patterns(by_target, names | several | {"gate": rf"{names['gate']}(\.weight)?"})
    of_rows, settings = peft_rows.of_model(model)
    tensors, config = tensors | of_rows, config | settings
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "adapter_model.safetensors"

    def compare(new: Path) -> None:
        written = load_file(str(new))
        if written.keys() != tensors.keys() or any(not np.array_equal(written[k], tensors[k]) for k in tensors):
            raise UserError(f"{path} reads back differently from what was written: a full or failing disk?")

    write_file(path, tensors, compare, base or {})
    replace_text(folder / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_adapter(model: Model, folder: Path) -> None:
    """Read an adapter into the model's LoRA weights and trained rows, exactly. Raises UserError where rank, targets, rows or tensors
    disagree."""
    config = read_adapter_config(folder)
    path, tensors = _read_tensors(folder)
    rows = peft_rows.take(model, tensors, config, path)
    theirs: dict[str, Pair] = {}
    if config.get("target_parameters"):
        tensors, theirs = unfuse(tensors, config, model.config, path, _by_target(model))
    elif config.get("rank_pattern") or config.get("alpha_pattern"):
        check_patterns(config, {name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in tensors}, path)
    _check_targets(model, tensors, path)
    buffers: dict[int, tuple[Any, np.ndarray]] = {}
    for name, (place, lora) in adapted(model).items():
        their, own = theirs.get(name) or pair_of(config, name, path), lora.pair()
        if their.rank != own.rank or abs(their.alpha - own.alpha) > 1e-6 * max(1, own.alpha):
            several = config.get("rank_pattern") or config.get("alpha_pattern")
            raise UserError(
                f"{folder}: {f'{name} has ' if several else ''}rank {their.rank}, alpha {their.alpha:g}; the model's adapter has rank "
                f"{own.rank}, alpha {own.alpha:g}: set adapter.rank and adapter.alpha to the adapter's"
            )
        index = index_of(place)
        for letter, variable in variables(model, place, lora).items():
            if id(variable) not in buffers:
                held = variable.get_value()
                buffers[id(variable)] = variable, np.empty(held.shape, held.dtype)
            buffer = buffers[id(variable)][1]
            value = _take(tensors, f"{_PREFIX}{name}.lora_{letter}.weight", buffer[index].shape, path).astype(buffer.dtype)
            if letter == "A" and lora.shares and not np.array_equal(value, buffer[index]):  # its owner comes before it
                raise UserError(
                    f"{path}: the A of {name} is another than that of the expert's {model.config.target_names[lora.shares]}, and "
                    "adapter.share asks for one: leave adapter.share out"
                )
            buffer[index] = value
    if tensors:
        raise UserError(f"{path}: {len(tensors)} tensors have no place in this model's adapter, first {next(iter(tensors))!r}")
    for variable, buffer in (*buffers.values(), *rows):
        variable.set_value(jnp.asarray(buffer))


def _read_tensors(folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """An adapter's file and its tensors: safetensors, or where there is none the .bin that older PEFT wrote."""
    path, older = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if not path.exists() and older.is_file():
        with TorchFile(older) as file:
            return older, {name: np.asarray(file.get_tensor(name)) for name in file.names()}
    try:
        path.open("rb").close()  # the library calls every failure to open "no such file"
        tensors = load_file(str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except SafetensorError as error:
        what = lfs_pointer(path) or f"cannot be read ({error}): write or download the adapter again"
        raise UserError(f"{path} {what}") from None
    with closing(Summed(path)) as file:  # of an adapter that was written here
        for name, value in tensors.items():
            file.check(name, value)
    return path, tensors


BASE, STORED = "base_sha256", "base_stored"
"""In an adapter's file: the hash of the base's weights as they were stored, and how that was. Hashes of another storage are others."""


def continue_from(model: Model, folder: Path, base_name: str | None, base: Mapping[str, str] | None = None) -> None:
    """Read the adapter in `folder` into the model's LoRA weights (abstract or not), to be trained on.

    base: BASE and STORED of the model's base, where they are known. Raises UserError where the adapter was made for another base, by
    name or by its weights, where it is more than plain LoRA, and as `load_adapter` does. Base names are compared by their last part, as
    a Hub id may lie in a folder of that name.
    """
    config = read_adapter_config(folder)
    theirs = config.get("base_model_name_or_path")
    if theirs and base_name and _last_part(theirs) != _last_part(base_name):
        raise UserError(
            f"{folder} is an adapter of {theirs!r}, model.source = {base_name!r}: another base model. If they are the same under two "
            "names, set base_model_name_or_path in its adapter_config.json"
        )
    path = folder / "adapter_model.safetensors"
    if base and path.is_file():
        with closing(Summed(path)) as file:
            known = file.metadata
        if known.get(STORED) == base[STORED] and known.get(BASE) != base[BASE]:
            raise UserError(
                f"{folder} was trained on {theirs or 'a base'} with other weights (sha256 {known.get(BASE, '')[:16]}…) than model.source = "
                f"{base_name!r} has ({base[BASE][:16]}…): another base. Give the one that it was trained on"
            )
    load_adapter(model, folder)


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


_LORA: dict[str, Any] = dict.fromkeys(
    (
        # What is read, judged by the tensors, or says what the adapter is and how it was trained …
        "r", "lora_alpha", "target_modules", "exclude_modules", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path",
        "revision", "inference_mode", "lora_dropout", "eva_config", "ensure_weight_tying", "rank_pattern", "alpha_pattern", peft_rows.KEY,
        # … and what has no effect without another setting, which is refused.
        "layers_pattern", "megatron_core", "qalora_group_size",
    ),
    ANY,
) | {
    "peft_type": ("LORA",), "bias": ("none",),
    "use_rslora": (False, True), "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}  # fmt: skip
"""What LoraConfig of PEFT 0.18 to 0.21 may say where its adapter is plain LoRA. PiSSA and its like change the base model's own weights."""


def _check_plain(config: dict[str, Any], path: Path) -> None:
    """Refuse what PEFT would compute and this LoRA does not, and what nobody here knows: it would load, and give other numbers."""
    found = list(uncomputed(config, _LORA | {"target_parameters": ANY}))
    if found:
        raise UserError(
            f"{path} has {', '.join(found)}: only plain LoRA over the base's own weights is computed here. Give a plain adapter; or, if "
            "you know that this changes nothing, take it out of the file"
        )
    kinds: tuple[tuple[str, Any, str], ...] = (
        ("r", int, "a whole number above 0"), ("lora_alpha", int | float, "a number above 0"), ("base_model_name_or_path", str, "a name"),
        ("target_parameters", list, "a list of names"), ("rank_pattern", dict, "names and values"),
        ("alpha_pattern", dict, "names and values"),
    )  # fmt: skip
    for name, kind, expected in kinds:
        value = config.get(name)
        above_0 = expected.endswith("above 0")
        wrong = isinstance(value, bool) or not isinstance(value, kind) or (above_0 and not 0 < value < math.inf)
        if wrong and (above_0 or value is not None):
            raise UserError(f"{path} has {name} = {json.dumps(value)}: expected {expected}")


def _check_targets(model: Model, tensors: dict[str, np.ndarray], path: Path) -> None:
    """The layers that the file has pairs for must be those that the model has adapters on: said by target, not tensor by tensor."""
    named = {f"{_PREFIX}{name}": model.config.target_names[target] for name, target in target_of(model.config).items()}
    found = {name.removesuffix(".weight").rpartition(".lora_")[0] for name in tensors}
    theirs = {named.get(name, name.rpartition(".")[2]) for name in found}
    ours = {named[f"{_PREFIX}{name}"] for name in adapted(model)}
    if theirs & {"experts", "base_layer"}:
        raise UserError(
            f"{path} has tensors in the format of transformers 5 with PEFT 0.19 or later (one adapter over all experts), but "
            "adapter_config.json has no target_parameters: expected both or neither; download the adapter again"
        )
    strange = sorted(theirs - set(model.config.target_names.values()))
    if strange:
        raise UserError(
            f"{path} adapts {', '.join(strange)}, which a {model.config.title} does not have: an adapter of another family? "
            f"Its matrices are {', '.join(model.config.target_names.values())}"
        )
    if theirs != ours:
        raise UserError(
            f"{path} adapts {', '.join(sorted(theirs)) or 'nothing'}; the model's adapter {', '.join(sorted(ours))}: set adapter.targets "
            "to the adapter's"
        )


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter's configuration. Raises UserError where the folder holds none, or one that is more than plain LoRA."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        inner = folder / "adapter" / path.name
        there = f", and this is the folder of a run: its adapter is {inner.parent}" if inner.is_file() else ""
        there = there or (", and this is a model: give it as model.source" if (folder / "config.json").is_file() else "")
        raise UserError(f"{folder} holds no adapter_config.json: expected an adapter written by PEFT or by moejax{there}")
    config = read_json(path, remedy=AGAIN)
    _check_plain(config, path)
    return config


def _take(tensors: dict[str, np.ndarray], name: str, shape: tuple[int, ...], path: Path) -> np.ndarray:
    if name not in tensors:
        raise UserError(f"{path}: tensor {name!r} is missing: the adapter has other targets than the model's")
    return checked(tensors.pop(name), name, shape, path, "another base model?")
