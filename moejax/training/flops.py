"""The model FLOPs of a training step, of which model FLOP utilization (MFU) is made.

A multiply-add counts two. Per real token, with P_active the weights of the matrices it meets (attention, its K experts, router,
head; the embedding is a look-up):

    forward                       2·P_active + 2·r·(in + out) per adapted matrix (an A that two share: once) + attention scores
    gradient of the inputs        the same again (the chain passes through every frozen weight)
    gradient of the weights       the same for what is trained only: everything (full), or the adapter

Attention scores and their product with V: 2·heads·(numbers of a key + of a value) per query and visible key; a query at position t of
its segment sees t + 1 keys, or as many as its layer's window has; counted from the real segment lengths, twice as much again backward.
Recomputation is not counted: it is overhead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import assert_never

from moejax.models.config import Architecture, LoRAConfig, specs
from moejax.models.config.specs import EVERYWHERE


@dataclass(frozen=True)
class FlopCount:
    """FLOPs per real token, and per (query, visible key) pair of one optimizer step. within: those per pair of layers with a window, by the
    window."""

    per_token: float
    per_pair: float
    within: Mapping[int, float] = field(default_factory=dict)

    def step(self, tokens: int, lengths: list[int]) -> float:
        """Model FLOPs of a step with this many real tokens, in segments of these lengths."""
        of_windows = sum(flops * visible_pairs(lengths, window) for window, flops in self.within.items())
        return self.per_token * tokens + self.per_pair * visible_pairs(lengths) + of_windows


def _apart(half: specs.Mixer | specs.FeedForward) -> tuple[int, int]:
    """Multiply-adds a token next to the matrices, and FLOPs a pair."""
    match half:
        case specs.GQA(heads=heads, head_dim=c):
            return 0, 4 * heads * c
        case specs.MLA(heads=heads, head_dim=c, v_dim=v):
            return 0, 2 * heads * (c + v)
        case specs.Mamba(inner=inner, state=states, conv=taps):  # a state's decay, its input, and its sum with C
            return (taps + 3 * states) * inner, 0
        case specs.MoE() | specs.MLP():
            return 0, 0
        case _:
            assert_never(half)


def count(config: Architecture, adapter: LoRAConfig | None, *, reference: bool = False) -> FlopCount:
    """Model FLOPs of training: full fine-tuning without an adapter, frozen base with one; reference: and its forward pass alone."""
    linears = config.linears
    base = config.vocab_size * config.hidden_size + sum(n * m.met * m.out * m.inner for m, n in linears.values())
    scores: dict[int, int] = {}
    for stack in config.stacks:
        windows = stack.windows or (EVERYWHERE,) * stack.repeats
        for more, pair in map(_apart, stack.block.halves):
            base += stack.repeats * more
            for window in windows if pair else ():
                scores[window] = scores.get(window, 0) + pair

    def counted(per_token: float, times: int) -> FlopCount:
        within = {window: float(times * pair) for window, pair in scores.items() if window != EVERYWHERE}
        return FlopCount(per_token, times * scores.get(EVERYWHERE, 0), within)

    if adapter is None:
        return counted(6 * base, 3)
    adapted = [(linears[path], pair) for target, pair in adapter.of(config).items() for path in config.targets[target]]
    low_rank = sum(n * m.met * pair.weights(m) for (m, n), pair in adapted)
    return counted((6 if reference else 4) * base + 6 * low_rank, 4 if reference else 3)


def visible_pairs(lengths: list[int], window: int = EVERYWHERE) -> int:
    """(query, key) pairs of causal attention inside segments of these lengths, each query with as many keys as the window has."""
    return sum(n * (n + 1) // 2 - (rest := max(0, n - window)) * (rest + 1) // 2 for n in lengths)
