"""OLMoE (arXiv 2409.02060): small experts, an RMSNorm of q and of k over all heads, expert weights as the softmax gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from moejax.models import foreign_settings as foreign
from moejax.models.families.attention_moe import AttentionMoEConfig


@dataclass(frozen=True)
class OlmoeConfig(AttentionMoEConfig):
    """Defaults: OLMoE-1B-7B. norm_topk_prob: the weights of a token's experts sum to one."""

    vocab_size: int = 50304
    hidden_size: int = 2048
    intermediate_size: int = 1024
    num_layers: int = 16
    num_heads: int = 16
    num_kv_heads: int = 16
    head_dim: int = 128
    num_experts: int = 64
    experts_per_token: int = 8
    rope_theta: float = 1e4
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False
    router_aux_loss_coef: float = 0.01
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = 50279
    norm_topk_prob: bool = False

    model_type: ClassVar[str] = "olmoe"
    title: ClassVar[str] = "OLMoE"
    architecture: ClassVar[str] = "OlmoeForCausalLM"
    qk_norm: ClassVar[Literal["head", "all"] | None] = "all"
    missing: ClassVar[Mapping[str, Any]] = {"num_key_value_heads": None}  # as many as query heads
    known: ClassVar[Mapping[str, Any]] = {"intermediate_size": foreign.ANY, "norm_topk_prob": (False, True)}

    @property
    def renormalizes(self) -> bool:
        return self.norm_topk_prob

    @classmethod
    def own_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return super().own_fields(config) | {"norm_topk_prob": bool(config.get("norm_topk_prob", False))}

    def to_hub_config(self) -> dict[str, Any]:
        more = {"num_experts": self.num_experts, "norm_topk_prob": self.norm_topk_prob, "attention_bias": False, "clip_qkv": None}
        return super().to_hub_config() | more

    @classmethod
    def presets(cls) -> dict[str, Self]:
        tiny = cls(
            vocab_size=512, hidden_size=128, intermediate_size=64, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=32, num_experts=16,
            experts_per_token=4, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        return {"olmoe-1b-7b": cls(), "olmoe-tiny": tiny}
