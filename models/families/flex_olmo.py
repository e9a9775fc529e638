"""FlexOlmo (arXiv 2507.07024): OLMoE with OLMo 2's norms behind attention and experts, and few large experts that were trained apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from moejax.models.config.specs import BlockNorm
from moejax.models.families.olmoe import OlmoeConfig


@dataclass(frozen=True)
class FlexOlmoConfig(OlmoeConfig):
    """Defaults: FlexOlmo-7x7B-1T, in which every token visits all experts. norm_topk_prob: the weights of a token's experts sum to one."""

    vocab_size: int = 100352
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    num_experts: int = 7
    experts_per_token: int = 7
    rope_theta: float = 5e5
    rms_norm_eps: float = 1e-6
    eos_token_id: int | tuple[int, ...] | None = 100257

    model_type: ClassVar[str] = "flex_olmo"
    title: ClassVar[str] = "FlexOlmo"
    architecture: ClassVar[str] = "FlexOlmoForCausalLM"
    block_norm: ClassVar[BlockNorm] = "after"
    missing: ClassVar[Mapping[str, Any]] = {"num_key_value_heads": None, "num_experts_per_tok": 5}

    @classmethod
    def presets(cls) -> dict[str, Self]:
        tiny = cls(
            vocab_size=512, hidden_size=128, intermediate_size=64, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=32, num_experts=8,
            experts_per_token=2, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        two = cls(num_experts=2, experts_per_token=2)
        return {"flex-olmo-7x7b": cls(), "flex-olmo-2x7b": two, "flex-olmo-tiny": tiny}
