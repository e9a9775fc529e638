"""Qwen3-MoE (arXiv 2505.09388): 30B-A3B, Coder, 235B-A22B. Many small experts, and an RMSNorm of every head of q and k."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from moejax.models import foreign_settings as foreign
from moejax.models.families.attention_moe import AttentionMoEConfig


@dataclass(frozen=True)
class Qwen3MoeConfig(AttentionMoEConfig):
    """Defaults: Qwen3-30B-A3B. norm_topk_prob: the weights of a token's experts sum to one."""

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 768
    num_layers: int = 48
    num_heads: int = 32
    num_kv_heads: int = 4
    head_dim: int = 128
    num_experts: int = 128
    experts_per_token: int = 8
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 40960
    tie_word_embeddings: bool = False
    router_aux_loss_coef: float = 0.001
    bos_token_id: int | None = 151643
    eos_token_id: int | tuple[int, ...] | None = 151645
    norm_topk_prob: bool = True

    model_type: ClassVar[str] = "qwen3_moe"
    title: ClassVar[str] = "Qwen3-MoE"
    architecture: ClassVar[str] = "Qwen3MoeForCausalLM"
    qk_norm: ClassVar[Literal["head", "all"] | None] = "head"
    missing: ClassVar[Mapping[str, Any]] = {"rope_theta": 1e4, "max_position_embeddings": 32768}
    known: ClassVar[Mapping[str, Any]] = {  # intermediate_size is of layers without experts, which are refused
        "intermediate_size": foreign.ANY, "moe_intermediate_size": foreign.ANY, "use_sliding_window": foreign.ANY,
        "max_window_layers": foreign.ANY, "norm_topk_prob": (False, True), "decoder_sparse_step": (1,),
    }  # fmt: skip

    @property
    def renormalizes(self) -> bool:
        return self.norm_topk_prob

    @classmethod
    def window(cls, config: Mapping[str, Any]) -> Any:
        return config.get("sliding_window", 4096) if config.get("use_sliding_window") else None

    @classmethod
    def own_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "intermediate_size": foreign.whole_number(config, "moe_intermediate_size", 768),
            "norm_topk_prob": bool(config.get("norm_topk_prob", False)),
        }

    def to_hub_config(self) -> dict[str, Any]:
        """transformers 4 reads `num_experts`, 5 `num_local_experts`."""
        return super().to_hub_config() | {
            "moe_intermediate_size": self.intermediate_size, "num_experts": self.num_experts, "norm_topk_prob": self.norm_topk_prob,
            "decoder_sparse_step": 1, "mlp_only_layers": [], "attention_bias": False, "use_sliding_window": False, "sliding_window": None,
        }  # fmt: skip

    @classmethod
    def presets(cls) -> dict[str, Self]:
        long = cls(rope_theta=1e7, max_position_embeddings=262144)
        tiny = cls(
            vocab_size=512, hidden_size=128, intermediate_size=48, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=48, num_experts=16,
            experts_per_token=4, max_position_embeddings=2048, rope_theta=1e4, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        return {
            "qwen3-30b-a3b": cls(),
            "qwen3-30b-a3b-2507": long,
            "qwen3-coder-30b-a3b": long,
            "qwen3-235b-a22b": cls(hidden_size=4096, intermediate_size=1536, num_layers=94, num_heads=64),
            "qwen3-moe-tiny": tiny,
        }
