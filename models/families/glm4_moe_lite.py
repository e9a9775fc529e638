"""GLM-4.7-Flash: DeepSeek-V3's blocks with queries from a latent and one group of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from moejax.models.families.deepseek_v2 import TINY
from moejax.models.families.deepseek_v3 import DeepseekV3Config


@dataclass(frozen=True)
class Glm4MoeLiteConfig(DeepseekV3Config):
    """Defaults: GLM-4.7-Flash, whose checkpoint has a layer more, for predicting a second token."""

    vocab_size: int = 154880
    intermediate_size: int = 1536
    num_layers: int = 47
    num_heads: int = 20
    num_kv_heads: int = 20
    experts_per_token: int = 4
    rope_theta: float = 1e6
    max_position_embeddings: int = 202752
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = (154820, 154827, 154829)
    q_lora_rank: int | None = 768
    qk_nope_head_dim: int = 192
    v_head_dim: int = 256
    shared_experts: int = 1
    dense_size: int = 10240
    routed_scaling_factor: float = 1.8

    model_type: ClassVar[str] = "glm4_moe_lite"
    title: ClassVar[str] = "GLM-4.7-Flash"
    architecture: ClassVar[str] = "Glm4MoeLiteForCausalLM"
    missing: ClassVar[Mapping[str, Any]] = {"rope_theta": 1e4, "max_position_embeddings": 202752, "rms_norm_eps": 1e-5}

    def to_hub_config(self) -> dict[str, Any]:
        kinds = ["dense"] * self.dense_layers + ["sparse"] * (self.num_layers - self.dense_layers)
        return super().to_hub_config() | {"mlp_layer_types": kinds}

    @classmethod
    def presets(cls) -> dict[str, Self]:
        tiny = cls(**TINY | {"q_lora_rank": 80, "qk_nope_head_dim": 48, "v_head_dim": 64})
        return {"glm-4.7-flash": cls(), "glm4-moe-lite-tiny": tiny}
