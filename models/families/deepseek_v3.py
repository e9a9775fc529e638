"""DeepSeek-V3's architecture (arXiv 2412.19437) with one group of experts: Moonlight-16B-A3B (arXiv 2502.16982)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from moejax.models.families.latent_moe import KNOWN, LatentMoEConfig


@dataclass(frozen=True)
class DeepseekV3Config(LatentMoEConfig):
    """Defaults: Moonlight-16B-A3B-Instruct. DeepSeek-V3 itself chooses among 8 groups of experts, and is refused by that."""

    vocab_size: int = 163840
    hidden_size: int = 2048
    intermediate_size: int = 1408
    num_layers: int = 27
    num_heads: int = 16
    num_kv_heads: int = 16
    head_dim: int = 64
    num_experts: int = 64
    experts_per_token: int = 6
    rope_theta: float = 5e4
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = False
    router_aux_loss_coef: float = 0.0
    bos_token_id: int | None = 163584
    eos_token_id: int | tuple[int, ...] | None = 163586
    q_lora_rank: int | None = None
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    v_head_dim: int = 128
    shared_experts: int = 2
    dense_layers: int = 1
    dense_size: int = 11264
    routed_scaling_factor: float = 2.446
    norm_topk_prob: bool = True

    model_type: ClassVar[str] = "deepseek_v3"
    title: ClassVar[str] = "DeepSeek-V3"
    architecture: ClassVar[str] = "DeepseekV3ForCausalLM"
    missing: ClassVar[Mapping[str, Any]] = {"rope_theta": 1e4, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6}
    known: ClassVar[Mapping[str, Any]] = KNOWN | {
        "topk_method": ("noaux_tc",), "scoring_func": ("sigmoid",), "rope_interleave": (True,), "mlp_layer_types": None,
    }  # fmt: skip

    @classmethod
    def presets(cls) -> dict[str, Self]:
        tiny = cls(
            vocab_size=512, hidden_size=128, intermediate_size=48, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=16, num_experts=16,
            experts_per_token=4, max_position_embeddings=2048, rope_theta=1e4, bos_token_id=1, eos_token_id=2, kv_lora_rank=64,
            qk_nope_head_dim=32, v_head_dim=24, dense_size=176,
        )  # fmt: skip
        return {"moonlight-16b-a3b": cls(), "deepseek-v3-tiny": tiny}
