"""DeepSeek-V2 (arXiv 2405.04434) with one group of experts: V2-Lite. Stretched positions, and weights as the softmax gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from moejax.models.config.rope import Yarn
from moejax.models.families.latent_moe import KNOWN, LatentMoEConfig

TINY: dict[str, Any] = dict(
    vocab_size=512, hidden_size=128, intermediate_size=48, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=16, num_experts=16,
    experts_per_token=4, max_position_embeddings=2048, rope_theta=1e4, bos_token_id=1, eos_token_id=2, kv_lora_rank=64,
    qk_nope_head_dim=32, v_head_dim=24, dense_size=176,
)  # fmt: skip


@dataclass(frozen=True)
class DeepseekV2Config(LatentMoEConfig):
    """Defaults: DeepSeek-V2-Lite. DeepSeek-V2 itself chooses among groups of experts, and is refused by that."""

    vocab_size: int = 102400
    hidden_size: int = 2048
    intermediate_size: int = 1408
    num_layers: int = 27
    num_heads: int = 16
    num_kv_heads: int = 16
    head_dim: int = 64
    num_experts: int = 64
    experts_per_token: int = 6
    rope_theta: float = 1e4
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 163840
    tie_word_embeddings: bool = False
    router_aux_loss_coef: float = 0.0
    bos_token_id: int | None = 100000
    eos_token_id: int | tuple[int, ...] | None = 100001
    q_lora_rank: int | None = None
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    v_head_dim: int = 128
    shared_experts: int = 2
    dense_layers: int = 1
    dense_size: int = 10944
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = False

    model_type: ClassVar[str] = "deepseek_v2"
    title: ClassVar[str] = "DeepSeek-V2"
    architecture: ClassVar[str] = "DeepseekV2ForCausalLM"
    scores: ClassVar[Literal["softmax", "sigmoid"]] = "softmax"
    missing: ClassVar[Mapping[str, Any]] = {"max_position_embeddings": 2048}
    known: ClassVar[Mapping[str, Any]] = KNOWN | {
        "topk_method": ("greedy",), "scoring_func": ("softmax",), "norm_topk_prob": (False,),
    }  # fmt: skip

    @classmethod
    def presets(cls) -> dict[str, Self]:
        stretched = Yarn(40.0, 4096, mscale=0.707, mscale_all_dim=0.707)
        return {"deepseek-v2-lite": cls(rope_scaling=stretched), "deepseek-v2-tiny": cls(**TINY)}
