"""DeepSeek-V3's architecture (arXiv 2412.19437) with one group of experts: Moonlight-16B-A3B (arXiv 2502.16982)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from moejax.models.families.deepseek_v2 import TINY, DeepseekV2Config
from moejax.models.families.latent_moe import KNOWN


@dataclass(frozen=True)
class DeepseekV3Config(DeepseekV2Config):
    """Defaults: Moonlight-16B-A3B-Instruct, of V2-Lite's sizes. DeepSeek-V3 itself chooses among 8 groups of experts, and is refused by
    that."""

    vocab_size: int = 163840
    rope_theta: float = 5e4
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 8192
    bos_token_id: int | None = 163584
    eos_token_id: int | tuple[int, ...] | None = 163586
    dense_size: int = 11264
    routed_scaling_factor: float = 2.446
    norm_topk_prob: bool = True
    rope_interleave: bool = dataclasses.field(default=True, kw_only=True, repr=False)

    model_type: ClassVar[str] = "deepseek_v3"
    title: ClassVar[str] = "DeepSeek-V3"
    architecture: ClassVar[str] = "DeepseekV3ForCausalLM"
    scores: ClassVar[Literal["softmax", "sigmoid"]] = "sigmoid"
    missing: ClassVar[Mapping[str, Any]] = {"rope_theta": 1e4, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6}
    known: ClassVar[Mapping[str, Any]] = KNOWN | {
        "topk_method": ("noaux_tc",), "scoring_func": ("sigmoid",), "rope_interleave": (False, True), "mlp_layer_types": None,
    }  # fmt: skip

    @property
    def interleaved(self) -> bool:
        return self.rope_interleave

    @classmethod
    def own_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return super().own_fields(config) | {"rope_interleave": bool(config.get("rope_interleave", True))}

    def to_hub_config(self) -> dict[str, Any]:
        return super().to_hub_config() | {"rope_interleave": self.rope_interleave}

    @classmethod
    def presets(cls) -> dict[str, Self]:
        return {"moonlight-16b-a3b": cls(), "deepseek-v3-tiny": cls(**TINY)}
