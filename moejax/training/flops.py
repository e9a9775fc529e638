"""The model FLOPs of a training step, of which model FLOP utilization (MFU) is made.

A multiply-add counts two. Per real token, with P_active the weights of the matrices it meets (attention, its K experts, router,
head; the embedding is a look-up):

    forward                       2·P_active + 2·r·(in + out) per adapted matrix (an A that two share: once) + attention scores
    gradient of the inputs        the same again (the chain passes through every frozen weight)
    gradient of the weights       the same for what is trained only: everything (full), or the adapter

Attention scores and their product with V: 4·heads·head_dim per query and visible key; a query at position t of its segment sees
t + 1 keys; counted from the real segment lengths, twice as much again backward. Recomputation is not counted: it is overhead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

from moejax.models.config import Architecture, LoRAConfig, specs


@dataclass(frozen=True)
class FlopCount:
    """FLOPs per real token, and per (query, visible key) pair of one optimizer step."""

    per_token: float
    per_pair: float

    def step(self, tokens: int, pairs: int) -> float:
        """Model FLOPs of a step with so many real tokens and visible (query, key) pairs."""
        return self.per_token * tokens + self.per_pair * pairs


def _apart(half: specs.Mixer | specs.FeedForward) -> tuple[int, int]:
    """Multiply-adds a token beside the matrices, and FLOPs a pair."""
    match half:
        case specs.GQA(heads=heads, head_dim=c):
            return 0, 4 * heads * c
        case specs.Mamba(inner=inner, state=states, conv=taps):  # a state's decay, its input, and its sum with C
            return (taps + 3 * states) * inner, 0
        case specs.MoE():
            return 0, 0
        case _:
            assert_never(half)


def count(config: Architecture, adapter: LoRAConfig | None, *, reference: bool = False) -> FlopCount:
    """Model FLOPs of training: full fine-tuning without an adapter, frozen base with one; reference: and its forward pass alone."""
    linears = config.linears
    base = config.vocab_size * config.hidden_size + sum(n * m.met * m.out * m.inner for m, n in linears.values())
    scores = 0
    for stack in config.stacks:
        for more, pair in map(_apart, stack.block.halves):
            base, scores = base + stack.repeats * more, scores + stack.repeats * pair
    if adapter is None:
        return FlopCount(6 * base, 3 * scores)
    adapted = [(linears[path], pair) for target, pair in adapter.of(config).items() for path in config.targets[target]]
    low_rank = sum(n * m.met * pair.weights(m) for (m, n), pair in adapted)
    return FlopCount((6 if reference else 4) * base + 6 * low_rank, (4 if reference else 3) * scores)


def visible_pairs(lengths: list[int]) -> int:
    """(query, key) pairs of causal attention inside segments of these lengths."""
    return sum(n * (n + 1) // 2 for n in lengths)
