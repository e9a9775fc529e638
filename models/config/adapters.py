"""How a model is stored and adapted: 4-bit storage, LoRA. No jax here."""

from __future__ import annotations

from dataclasses import dataclass

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w2", "w3")
QUANTIZED_MODULES = ("attention", "experts", "router")


@dataclass(frozen=True)
class Quantization:
    """4-bit storage of frozen weights. `double`: block scales in 8 bits too. `modules`: which of attention, experts, router; None: those
    that the family has by default."""

    double: bool = True
    modules: tuple[str, ...] | None = None

    @property
    def kind(self) -> str:
        """One of `moejax.models.ops.quantized.KINDS`."""
        return "nf4-double" if self.double else "nf4"

    def __post_init__(self) -> None:
        unknown = [m for m in self.modules or () if m not in QUANTIZED_MODULES]
        if unknown:
            raise ValueError(f"quantization modules {unknown}: expected some of {list(QUANTIZED_MODULES)}")


@dataclass(frozen=True)
class LoRAConfig:
    """LoRA as PEFT 0.18 on transformers 4 means it: one pair (A, B) per linear layer, per expert; delta = alpha/rank · B A.

    `targets`: by our names or the family's, `gate` is the router; None: the family's default. Dropout acts on the input of A.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoRA rank = {self.rank}: expected at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"LoRA dropout = {self.dropout}: expected 0 <= dropout < 1")
        if self.targets is not None and not self.targets:
            raise ValueError("LoRA targets [] match nothing: name some, or leave them out for the family's own")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank
