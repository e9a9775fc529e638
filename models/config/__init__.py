"""Architectures: their specs, how they are stored and adapted, and the families that are here. No jax.

A family is one file in `moejax.models.families` and one line here; or, from outside, one call of `register`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from moejax.models.config.adapters import LORA_TARGETS, QUANTIZED_MODULES, LoRAConfig, Quantization
from moejax.models.config.specs import Architecture
from moejax.models.families.blackmamba import BlackMambaConfig
from moejax.models.families.deepseek_v2 import DeepseekV2Config
from moejax.models.families.deepseek_v3 import DeepseekV3Config
from moejax.models.families.flex_olmo import FlexOlmoConfig
from moejax.models.families.glm4_moe_lite import Glm4MoeLiteConfig
from moejax.models.families.gpt_oss import GptOssConfig
from moejax.models.families.mixtral import MixtralConfig
from moejax.models.families.olmoe import OlmoeConfig
from moejax.models.families.qwen3_moe import Qwen3MoeConfig

__all__ = [
    "FAMILIES", "LORA_TARGETS", "PRESETS", "QUANTIZED_MODULES", "Architecture", "BlackMambaConfig", "LoRAConfig", "MixtralConfig",
    "OlmoeConfig", "Quantization", "Qwen3MoeConfig", "from_hub_config", "register", "target_aliases",
]  # fmt: skip

FAMILIES: dict[str, type[Architecture]] = {}
"""model_type -> family."""
PRESETS: dict[str, Architecture] = {}


def register(family: type[Architecture]) -> type[Architecture]:
    """Make a family known: its config.json is read, its presets have names. A class decorator, too. Raises ValueError for a name that
    another one has."""
    presets = family.presets()
    taken = [family.model_type] * (family.model_type in FAMILIES) + [name for name in presets if name in PRESETS]
    if taken:
        raise ValueError(f"{family.__name__}: {taken[0]!r} is the name of another family or preset: choose another")
    FAMILIES[family.model_type] = family
    PRESETS.update(presets)
    return family


def target_aliases() -> dict[str, str]:
    """What the families' checkpoints call an adapter's target -> our name."""
    return {theirs: ours for preset in PRESETS.values() for ours, theirs in preset.target_names.items()}


for _family in (
    MixtralConfig, BlackMambaConfig, Qwen3MoeConfig, OlmoeConfig, FlexOlmoConfig, GptOssConfig, DeepseekV2Config, DeepseekV3Config,
    Glm4MoeLiteConfig,
):  # fmt: skip
    register(_family)

_NOT_YET = {
    "qwen3_5_moe": "Qwen3.5", "qwen3_5_moe_text": "Qwen3.5", "qwen3_6_moe": "Qwen3.6", "gemma4": "Gemma 4", "gemma4_text": "Gemma 4",
}  # fmt: skip


def from_hub_config(config: Mapping[str, Any], ignored: Collection[str] = ()) -> Architecture:
    """Read a Hub `config.json`.

    ignored: keys of it that may say what they want. Raises ValueError for a family that is not here, and for every setting that is not
    known to be computed here (scaled rotary positions, a sliding window, a dropout of transformers' own, a key that nobody knows): such a
    model would give other numbers without saying so. Raises KeyError where a size is missing.
    """
    for family in FAMILIES.values():
        if family.recognizes(config):
            found = family.from_hub(config, ignored)
            stored = config.get("quantization_config")
            in_mxfp4 = isinstance(stored, Mapping) and stored.get("quant_method") == "mxfp4"
            return found.replace(expert_format="mxfp4") if in_mxfp4 else found
    model_type = config.get("model_type")
    not_yet = _NOT_YET.get(str(model_type))
    there = ", ".join(f"{name} ({family.title})" for name, family in FAMILIES.items())
    raise ValueError(
        f"config.json has model_type = {model_type!r}: {f'{not_yet} is not here yet; ' if not_yet else ''}expected one of {there}"
    )
