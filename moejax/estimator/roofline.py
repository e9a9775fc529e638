"""FLOPs and bytes of a step by arithmetic from the model's sizes: what the GPU's peaks alone would allow.

A multiply-add counts two. Every matrix is multiplied in the forward pass, once for the gradient of its input, and, where it is trained,
once for its own. Recomputation, attention's scores, norms, activations and adapters are left out: what is left is a lower bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moejax.gpus import GPU
from moejax.models.config import Architecture, LoRAConfig
from moejax.models.ops.quantized import KINDS

Method = Literal["qlora", "lora", "full"]
STUDY_MODELS: dict[str, tuple[str, Method]] = {"mixtral": ("mixtral-8x7b", "qlora"), "blackmamba": ("blackmamba-2.8b", "full")}
QLORA_BYTES = KINDS["nf4-double"].bytes_per_weight


@dataclass(frozen=True)
class Work:
    """Weights by how often a token meets them, and products per weight in a step."""

    method: Method
    rest_weights: float  # of the layers, met by every token: attention or Mamba, routers
    expert_weights: float  # of one expert in every layer
    table_weights: float  # embedding and head, as stored
    head_products: float  # of the head alone: the embedding is a look-up
    experts: int

    @property
    def weights(self) -> float:
        return self.rest_weights + self.experts * self.expert_weights + self.table_weights

    @property
    def layer_bytes(self) -> float:
        """Of a weight in a layer."""
        return QLORA_BYTES if self.method == "qlora" else 2.0

    def least_seconds(self, gpu: GPU, tokens: float, share: float) -> float:
        """What no implementation can undercut: the useful FLOPs at the card's highest peak, whatever its dtype (PyTorch's runs on a T4
        are in fp16), or reading twice what a single token meets."""
        met = self.rest_weights + share * self.experts * self.expert_weights
        flops = 2 * (2 + (self.method == "full")) * tokens * (met + self.head_products)
        read = 2 * self.head_products + self.layer_bytes * met
        return max(flops / gpu.flops_per_second, 2 * read / gpu.bytes_per_second)

    def resident_gb(self, adapter_weights: float) -> float:
        """GB of weights, gradients and Adam's moments, before any activation: the study's dtypes (bf16; NF4 for QLoRA's layers)."""
        if self.method == "full":
            return 4 * 2 * self.weights / 1e9
        base = 2 * self.table_weights + self.layer_bytes * (self.weights - self.table_weights)
        return (base + 4 * 4 * adapter_weights) / 1e9  # adapters: fp32, as are their gradients and moments


def work(config: Architecture, method: Method) -> Work:
    """The step's work for an architecture trained by a method."""
    head, linears = config.vocab_size * config.hidden_size, config.linears
    rest = sum(blocks * m.out * m.inner for m, blocks in linears.values() if m.copies is None)
    expert = sum(blocks * m.out * m.inner for m, blocks in linears.values() if m.copies is not None)
    return Work(method, rest, expert, head if config.tie_word_embeddings else 2 * head, head, config.num_experts)


def adapter_weights(config: Architecture, adapter: LoRAConfig | None = None) -> float:
    """Weights of a LoRA adapter; without one, of the study's: on every expert and router."""
    adapter, linears = adapter or LoRAConfig(), config.linears
    adapted = [(linears[path], pair) for target, pair in adapter.of(config).items() for path in config.targets[target]]
    return sum(blocks * (m.copies or 1) * pair.weights(m) for (m, blocks), pair in adapted)
