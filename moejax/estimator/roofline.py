"""FLOPs and bytes of a step by arithmetic from the model's sizes: what the GPU's peaks alone would allow.

A multiply-add counts two. Every matrix is multiplied in the forward pass, once for the gradient of its input, and, where it is trained,
once for its own. Recomputation, attention's scores, norms, activations and adapters are left out: what is left is a lower bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moejax.gpus import GPU
from moejax.models.config import PRESETS, Architecture, LoRAConfig
from moejax.models.ops.quantized import KINDS

Method = Literal["qlora", "lora", "full"]
STUDY_MODELS: dict[str, tuple[str, Method]] = {"mixtral": ("mixtral-8x7b", "qlora"), "blackmamba": ("blackmamba-2.8b", "full")}
QLORA_BYTES = KINDS["nf4-double"].bytes_per_weight


@dataclass(frozen=True)
class Work:
    """Weights by how often a token meets them, and products per weight in a step."""

    rest_weights: float  # of the layers, met by every token: attention or Mamba, routers
    expert_weights: float  # of one expert in every layer
    table_weights: float  # embedding and head, as stored
    head_products: float  # of the head alone: the embedding is a look-up
    experts: int
    trained: bool  # all weights, and not adapters

    @property
    def weights(self) -> float:
        return self.rest_weights + self.experts * self.expert_weights + self.table_weights

    def least_seconds(self, gpu: GPU, tokens: float, share: float, method: Method) -> float:
        """What no implementation can undercut: the useful FLOPs at the peak, or reading twice what a single token meets."""
        met = self.rest_weights + share * self.experts * self.expert_weights
        flops = 2 * (2 + self.trained) * tokens * (met + self.head_products)
        read = 2 * self.head_products + (QLORA_BYTES if method == "qlora" else 2) * met
        return max(flops / gpu.flops_per_second, 2 * read / gpu.bytes_per_second)

    def resident_gb(self, method: Method, adapter_weights: float = 0.0) -> float:
        """GB of weights, gradients and Adam's moments, before any activation: the study's dtypes (bf16; NF4 for QLoRA's layers)."""
        if method == "full":
            return 4 * 2 * self.weights / 1e9
        layers = self.weights - self.table_weights
        base = 2 * self.table_weights + (QLORA_BYTES if method == "qlora" else 2) * layers
        return (base + 4 * 4 * adapter_weights) / 1e9  # adapters: fp32, as are their gradients and moments


def work(config: Architecture, method: Method) -> Work:
    """The step's work for an architecture trained by a method."""
    head, rest, expert = config.vocab_size * config.hidden_size, 0, 0
    for matrix, blocks in config.linears.values():
        size = blocks * matrix.out * matrix.inner
        rest, expert = (rest + size, expert) if matrix.copies is None else (rest, expert + size)
    return Work(rest, expert, head if config.tie_word_embeddings else 2 * head, head, config.num_experts, method == "full")


def adapter_weights(config: Architecture, adapter: LoRAConfig | None = None) -> float:
    """Weights of a LoRA adapter; without one, of the study's: on every expert and router."""
    adapter, linears = adapter or LoRAConfig(), config.linears
    adapted = [(linears[path], pair) for target, pair in adapter.of(config).items() for path in config.targets[target]]
    return sum(blocks * (m.copies or 1) * pair.weights(m) for (m, blocks), pair in adapted)


def of_study(model: str) -> Work:
    """The work of the study's "mixtral" (QLoRA) or "blackmamba" (all weights)."""
    preset, method = STUDY_MODELS[model]
    return work(PRESETS[preset], method)
