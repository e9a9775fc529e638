"""Peak memory of another tool's step: what it stores, by arithmetic, and a number of bytes for each token, fitted to receipts. No jax.

    peak = weights + adapters, gradients and moments + one layer's (unsloth) or expert's (e4b) weights in bf16 + tokens · bytes

Weights in 4 bits are the linear layers; embedding and head are bf16. Adapters and their gradients are fp32. Experts in the host's memory
leave one layer's codes on the device. `unsloth` quantizes its scales too, whatever a receipt says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moejax.estimator.least_squares import FloatArray
from moejax.estimator.receipts import Receipt
from moejax.estimator.tools import work
from moejax.estimator.tools.fitted import half_width
from moejax.estimator.tools.work import BF16, BYTES, FP32, MOMENTS, Recipe
from moejax.gpus import GPU

PER_TOKEN = {"unsloth": 0.2e6, "e4b": 4e6, "transformers": 2e6}
"""Bytes of a micro-batch's token before any receipt: streams between layers; and logits, which unsloth never holds whole."""
_AS = 2.0
"""Receipts that the figure above counts as."""


@dataclass(frozen=True)
class Peak:
    """GB (1e9 bytes) as the allocator counts them, and between which it lies."""

    gb: float
    interval: tuple[float, float]


def stored_gb(recipe: Recipe) -> float:
    """Without what tokens take."""
    config = recipe.config
    kind = "nf4+dq" if recipe.tool == "unsloth" and recipe.weights.startswith(("nf4", "4-bit")) else recipe.weights
    experts = {True: 0.0, False: 0.0}
    of_layer, of_expert = 0.0, 0.0
    for m, blocks in config.linears.values():
        weights = blocks * (m.copies or 1) * m.out * m.inner
        experts[bool(m.copies)] += weights
        if m.copies:
            of_layer += weights / blocks
            of_expert += m.out * m.inner
    on_device = experts[True] if not recipe.in_host else of_layer
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2) * BF16
    made = BF16 * (of_layer if recipe.tool == "unsloth" else of_expert) if BYTES[kind] < BF16 else 0.0
    adapters = recipe.trained * (2 * FP32 + MOMENTS.get(recipe.optimizer, 8.0))
    return (BYTES[kind] * (experts[False] + on_device) + tables + made + adapters) / 1e9


@dataclass(frozen=True)
class Peaks:
    """Receipts with a peak, and what was fitted to them."""

    recipes: tuple[Recipe, ...]
    measured: FloatArray
    receipts: tuple[Receipt, ...]

    def per_token(self, tool: str, without: int | None = None) -> float:
        """Bytes: the median of this tool's receipts, and of the figure that was known before."""
        own = [i for i, r in enumerate(self.recipes) if r.tool == tool and i != without]
        found = [max(0.0, 1e9 * (self.measured[i] - stored_gb(self.recipes[i])) / self.recipes[i].micro_tokens) for i in own]
        return float(np.median([*found, *[PER_TOKEN[tool]] * int(_AS)]))

    def gb(self, recipe: Recipe, without: int | None = None) -> float:
        return stored_gb(recipe) + self.per_token(recipe.tool, without) * recipe.micro_tokens / 1e9

    def left_out(self) -> FloatArray:
        """Logarithm of predicted over measured of each receipt, by all the others."""
        return np.log(np.array([self.gb(r, i) for i, r in enumerate(self.recipes)]) / self.measured)

    def estimate(self, recipe: Recipe) -> Peak:
        gb, half = self.gb(recipe), half_width(self.left_out())
        return Peak(gb, (gb * float(np.exp(-half)), gb * float(np.exp(half))))


def peaks(every: Sequence[Receipt], table: dict[str, GPU]) -> Peaks:
    """Of all receipts those with a peak whose method is known."""
    found = [(receipt, work.of_receipt(receipt, every, table)) for receipt in every if receipt.peak_gb_allocator]
    known = [(receipt, recipe) for receipt, recipe in found if recipe is not None]
    measured = np.array([receipt.peak_gb_allocator or 0.0 for receipt, _ in known])
    return Peaks(tuple(recipe for _, recipe in known), measured, tuple(receipt for receipt, _ in known))
