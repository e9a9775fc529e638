"""What a step of another tool does, by its method: bytes of weights that are dequantized and read, FLOPs, experts that are visited one by
one, bytes over the bus. No jax.

Both tools compute each layer three times over: forward, again (gradient checkpointing), backward; frozen weights in 4 bits are made bf16
each time and then read. `unsloth` dequantizes all experts of a layer at once and multiplies by torch's grouped product, which is one kernel
on a card that has it (`GROUPED`) and else a loop over the experts. `e4b` dequantizes the experts that were hit, one by one, or in its
later versions in one kernel. With experts in the host's memory a layer is fetched forward and backward.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from moejax.estimator import bus, lengths
from moejax.estimator.receipts import Receipt
from moejax.gpus import GPU, GPUS
from moejax.models.config import PRESETS, Architecture

TOOLS = ("unsloth", "e4b", "transformers")
"""Whose method is known here."""
BYTES = {"nf4": 0.5625, "nf4+dq": 0.515869, "nf4, fp32 scales": 0.5625, "4-bit": 0.5625, "mxfp4": 0.53125, "bf16": 2.0}
"""Of a weight: codes and scales."""
BF16, FP32 = 2, 4
GROUPED = ("9.0", "10.0", "10.3")
"""Compute capabilities with torch's own grouped product; elsewhere it falls back to one product after another."""
TIMES, FETCHES = 3, 2
MOMENTS = {"adamw_8bit": 2.03, "adamw": 8.0}
"""Bytes of both moments of a trained weight."""
_MEAN = "alpaca"


@dataclass(frozen=True)
class Recipe:
    """What is asked of a tool. rows, accumulation: of an optimizer step; row_tokens: the mean of real tokens in a row, padded_tokens: of a
    row as it is computed; trained: weights of the adapter."""

    tool: str
    version: str | None
    model: str
    config: Architecture
    gpu: GPU | None
    weights: str
    in_host: bool
    trained: float
    optimizer: str
    rows: int
    accumulation: int
    row_tokens: float
    padded_tokens: float

    @property
    def micro_tokens(self) -> float:
        """That a micro-batch computes."""
        return self.rows * self.padded_tokens


@dataclass(frozen=True)
class Work:
    """Of one micro-batch, at a card's data-sheet rates: seconds of moving weights, of FLOPs and of the bus; blocks; experts that are
    visited one after another, and without those that one kernel takes. step_seconds: of the optimizer, once a step."""

    moving: float
    computing: float
    fetching: float
    blocks: int
    visits: float
    visits_without_grouped: float
    step_seconds: float


def adapter_weights(config: Architecture, rank: int, experts: bool = True) -> int:
    """Of LoRA on the attention and, where asked, on every expert, whose gate and up projection have one A (transformers 5 stores one)."""
    total = 0
    for path, (m, blocks) in config.linears.items():
        if path in config.groups["router"] or (m.copies and not experts):
            continue
        sides = m.out if m.copies and path[-1] == "w3" else m.out + m.inner
        total += blocks * (m.copies or 1) * rank * sides
    return total


def padding(rows: int) -> float:
    """How much longer the longest of this many rows is than a row on average: of the study's commonsense queries, which are as spread as
    other instructions are."""
    spread = lengths.of_study("commonsense_15k")
    return spread.expected_longest(rows, multiple=1) / spread.mean


def of_receipt(r: Receipt, every: Sequence[Receipt], table: dict[str, GPU] = GPUS) -> Recipe | None:
    """What a receipt measured; None where model or tool is not known here. Its version and its rows' tokens, where they are not
    published, are those of receipts of the same session of work and of the same data."""
    if r.tool_name not in TOOLS or r.model not in PRESETS or r.weights not in BYTES:
        return None
    config, rows = PRESETS[r.model], r.micro_batch or 1
    tokens = r.row_tokens_mean or _tokens(r, every)
    named = re.match(r"([\d.]+) M trained", r.targets or "")
    experts = r.targets is None or "expert" in r.targets
    trained = 1e6 * float(named[1]) if named else adapter_weights(config, r.lora_rank or 16, experts)
    return Recipe(
        r.tool_name, r.tool_version or _version(r, every), r.model, config, table.get(r.gpu or ""), r.weights, r.experts_in == "host RAM",
        trained, r.optimizer or "adamw_8bit", rows, r.accumulation or 1, tokens, tokens * padding(rows),
    )  # fmt: skip


def _version(r: Receipt, every: Sequence[Receipt]) -> str | None:
    """The newest that the same session of work names."""
    found = [other.tool_version for other in every if other.tool_version and other.campaign == r.campaign]
    return max(found, key=version_number, default=None)


def _tokens(r: Receipt, every: Sequence[Receipt]) -> float:
    """The mean of what was published of the same data; of unnamed data of what is usual."""
    data = (r.row_tokens or _MEAN).split(",")[0]
    same = [o.row_tokens_mean for o in every if o.row_tokens_mean and (o.row_tokens or "").split(",")[0] == data]
    usual = [o.row_tokens_mean for o in every if o.row_tokens_mean and (o.row_tokens or "").split(",")[0] == _MEAN]
    found = same or usual
    return sum(found) / len(found) if found else 190.0


def version_number(version: str) -> float:
    """A version as a number that grows with it: months of one that names its year, else a hundred minor versions a major one."""
    first, second, third = ([*(int(part) for part in re.findall(r"\d+", version)), 0, 0, 0])[:3]
    return 12 * (first - 2000) + second + third / 31 if first > 2000 else 100 * first + second + third / 100


def work(recipe: Recipe, gpu: GPU) -> Work:
    """The counts of one recipe on one card."""
    tokens, config, stored = recipe.micro_tokens, recipe.config, BYTES[recipe.weights]
    met, moved_weights, visits, expert_weights = 0.0, 0.0, 0.0, 0.0
    for path, (m, blocks) in config.linears.items():
        weights = blocks * m.out * m.inner
        met += weights * (m.met if m.copies else 1)
        if not m.copies:
            moved_weights += weights
            continue
        hit = m.copies * (1 - (1 - m.met / m.copies) ** tokens)
        moved_weights += weights * (m.copies if recipe.tool == "unsloth" else hit)
        expert_weights += weights * m.copies
        visits += blocks * hit * (path[-1] == "w2")
    again = stored + 2 * BF16 if stored < BF16 else BF16  # codes read, bf16 written, bf16 read
    head = config.vocab_size * config.hidden_size
    grouped = recipe.tool == "unsloth" and gpu.compiler is not None and gpu.compiler.compute_capability in GROUPED
    optimizer = recipe.trained * (3 * FP32 + 2 * MOMENTS.get(recipe.optimizer, 8.0))
    return Work(
        TIMES * moved_weights * again / gpu.bytes_per_second,
        2 * TIMES * tokens * (met + head) / gpu.flops_per_second,
        FETCHES * expert_weights * stored / bus.rate(gpu) if recipe.in_host else 0.0,
        config.blocks, visits, 0.0 if grouped else visits, optimizer / gpu.bytes_per_second,
    )  # fmt: skip


