"""Mixtral (arXiv 2401.04088)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from moejax.models import foreign_settings as foreign
from moejax.models.families.attention_moe import AttentionMoEConfig


@dataclass(frozen=True)
class MixtralConfig(AttentionMoEConfig):
    """Defaults: Mixtral-8x7B."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    num_experts: int = 8
    experts_per_token: int = 2
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    router_aux_loss_coef: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2

    model_type: ClassVar[str] = "mixtral"
    title: ClassVar[str] = "Mixtral"
    architecture: ClassVar[str] = "MixtralForCausalLM"
    module: ClassVar[str] = "block_sparse_moe"
    matrices: ClassVar[tuple[str, str, str]] = ("w1", "w2", "w3")
    default_targets: ClassVar[tuple[str, ...]] = ("w1", "w2", "w3", "gate")
    default_quantized: ClassVar[tuple[str, ...]] = ("attention", "experts", "router")
    missing: ClassVar[Mapping[str, Any]] = {"max_position_embeddings": 131072, "router_aux_loss_coef": 0.001}
    known: ClassVar[Mapping[str, Any]] = {"intermediate_size": foreign.ANY, "router_jitter_noise": (0,), "norm_topk_prob": (True,)}

    def to_hub_config(self) -> dict[str, Any]:
        return super().to_hub_config() | {"router_jitter_noise": 0.0, "sliding_window": None}

    @classmethod
    def presets(cls) -> dict[str, Self]:
        tiny = cls(
            vocab_size=512, hidden_size=128, intermediate_size=160, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32,
            max_position_embeddings=2048, rope_theta=1e4,
        )  # fmt: skip
        return {"mixtral-8x7b": cls(), "mixtral-tiny": tiny}
