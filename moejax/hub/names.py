"""The one table between our parameters and the Hub's names."""

from __future__ import annotations

import re
from typing import NamedTuple

from models.config import MixtralConfig


class Place(NamedTuple):
    """Where a Hub tensor lives here: a path of attributes, the layer and the expert (None: not stacked)."""

    path: tuple[str, ...]
    layer: int | None = None
    expert: int | None = None


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


PEFT_TARGETS = {
    "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj", "o_proj": "self_attn.o_proj",
    "gate": "block_sparse_moe.gate", "w1": "w1", "w2": "w2", "w3": "w3",
}  # fmt: skip
