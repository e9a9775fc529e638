"""The one table between our parameters and the Hub's names."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from moejax.models.config import Architecture, MixtralConfig


class Place(NamedTuple):
    """Where a Hub tensor lives here: a path of modules, the layer and the expert (None: not stacked), the variable of the module.

    half: the first or second half of the tensor's rows (None: all of it).
    """

    path: tuple[str, ...]
    layer: int | None = None
    expert: int | None = None
    attr: str = "weight"
    half: int | None = None


def attribute(model: Any, path: tuple[str, ...]) -> Any:
    """The module at a path of attributes."""
    for name in path:
        model = getattr(model, name)
    return model


def index_of(place: Place) -> Any:
    """The index of one tensor in its stacked variable."""
    return tuple(i for i in (place.layer, place.expert) if i is not None) or ...


_LAYER = {
    "input_layernorm": ("attention_norm",),
    "post_attention_layernorm": ("moe_norm",),
    "self_attn.q_proj": ("attention", "q_proj"),
    "self_attn.k_proj": ("attention", "k_proj"),
    "self_attn.v_proj": ("attention", "v_proj"),
    "self_attn.o_proj": ("attention", "o_proj"),
    "block_sparse_moe.gate": ("moe", "router"),
}
_EXPERT = {"w1": ("moe", "w1"), "w2": ("moe", "w2"), "w3": ("moe", "w3")}
_TOP = {"model.embed_tokens": ("embed",), "model.norm": ("norm",), "lm_head": ("head",)}
_PATTERN = re.compile(r"model\.layers\.(\d+)\.(?:block_sparse_moe\.experts\.(\d+)\.(w[123])|(.+))$")


def place_of(name: str) -> Place | None:
    """The place of a Hub module (`model.layers.3.block_sparse_moe.experts.5.w1`, no `.weight`); None for an unknown one."""
    if name in _TOP:
        return Place(_TOP[name])
    match = _PATTERN.match(name)
    if not match:
        return None
    layer, expert, matrix, module = match.groups()
    if matrix:
        return Place(("layers", *_EXPERT[matrix]), int(layer), int(expert))
    return Place(("layers", *_LAYER[module]), int(layer)) if module in _LAYER else None


def module_names(config: MixtralConfig) -> dict[str, Place]:
    """Every Hub module of a Mixtral (without `.weight`) and its place here, in the Hub's order."""
    names = ["model.embed_tokens"]
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        names += [f"{prefix}.{module}" for module in _LAYER]
        names += [f"{prefix}.block_sparse_moe.experts.{e}.{w}" for e in range(config.num_experts) for w in _EXPERT]
    names += ["model.norm"] + ([] if config.tie_word_embeddings else ["lm_head"])
    places = {name: place_of(name) for name in names}
    return {name: place for name, place in places.items() if place is not None}


def tensors(config: Architecture) -> dict[str, tuple[Place, ...]]:
    """Every tensor of a checkpoint and its places here (two where a tensor holds two of our matrices), in the Hub's order."""
    if isinstance(config, MixtralConfig):
        return {f"{name}.weight": (place,) for name, place in module_names(config).items()}
    table: dict[str, tuple[Place, ...]] = {"embedding.word_embeddings.weight": (Place(("embed",)),)}
    for index in range(config.num_layers):
        prefix, layer = f"decoder.layers.{index}", index // 2
        if index % 2 == 0:
            table[f"{prefix}.norm.weight"] = (Place(("layers", "mamba_norm"), layer),)
            for name, (module, attr) in _MAMBA.items():
                table[f"{prefix}.mixer.{name}"] = (Place(("layers", "mamba", *module), layer, attr=attr),)
        else:
            table[f"{prefix}.norm.weight"] = (Place(("layers", "moe_norm"), layer),)
            for attr in ("weight", "bias"):
                table[f"{prefix}.mixer.router.{attr}"] = (Place(("layers", "moe", "router"), layer, attr=attr),)
            for e in range(config.num_experts):
                expert, moe = f"{prefix}.mixer.local_experts.{e}", ("layers", "moe")
                halves = (Place((*moe, "w1"), layer, e, half=0), Place((*moe, "w3"), layer, e, half=1))
                table[f"{expert}.linear_fc1.weight"] = halves
                table[f"{expert}.linear_fc2.weight"] = (Place((*moe, "w2"), layer, e),)
    for attr in ("weight", "bias"):
        table[f"decoder.final_layernorm.{attr}"] = (Place(("norm",), attr=attr),)
    return table


_MAMBA = {
    "A_log": ((), "a_log"), "D": ((), "d"), "in_proj.weight": (("in_proj",), "weight"), "conv1d.weight": (("conv",), "weight"),
    "conv1d.bias": (("conv",), "bias"), "x_proj.weight": (("x_proj",), "weight"), "dt_proj.weight": (("dt_proj",), "weight"),
    "dt_proj.bias": ((), "dt_bias"), "out_proj.weight": (("out_proj",), "weight"),
}  # fmt: skip

PEFT_TARGETS = {
    "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj", "o_proj": "self_attn.o_proj",
    "gate": "block_sparse_moe.gate", "w1": "w1", "w2": "w2", "w3": "w3",
}  # fmt: skip
