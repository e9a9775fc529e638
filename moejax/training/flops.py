"""Model FLOPs of a training step, and the device's peak: what model FLOP utilization (MFU) is made of.

A multiply-add counts two. Per real token, with P_active the weights of the matrices it meets (attention, its K experts, router,
head; the embedding is a look-up):

    forward                       2·P_active + 2·r·(in + out) per adapted matrix + attention scores
    gradient of the inputs        the same again (the chain passes through every frozen weight)
    gradient of the weights       the same for what is trained only: everything (full), or the adapter

Attention scores and their product with V: 4·heads·head_dim per query and visible key; a query at position t of its segment sees
t + 1 keys; counted from the real segment lengths, twice as much again backward. Recomputation is not counted: it is overhead.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

import jax
import jax.numpy as jnp

from moejax.estimator import gpus
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


def count(config: Architecture, adapter: LoRAConfig | None) -> FlopCount:
    """Model FLOPs of training: full fine-tuning without an adapter, frozen base with one."""
    linears = config.linears
    base = config.vocab_size * config.hidden_size + sum(n * m.met * m.out * m.inner for m, n in linears.values())
    scores = 0
    for stack in config.stacks:
        for more, pair in map(_apart, stack.block.halves):
            base, scores = base + stack.repeats * more, scores + stack.repeats * pair
    if adapter is None:
        return FlopCount(6 * base, 3 * scores)
    adapted = [linears[path] for target in adapter.targets for path in config.targets.get(target, ())]
    low_rank = sum(adapter.rank * n * m.met * (m.out + m.inner) for m, n in adapted)
    return FlopCount(4 * base + 6 * low_rank, 3 * scores)


def visible_pairs(lengths: list[int]) -> int:
    """(query, key) pairs of causal attention inside segments of these lengths."""
    return sum(n * (n + 1) // 2 for n in lengths)


def peak_flops(dtype: str) -> tuple[float, str]:
    """Peak FLOP/s of the first device and where the figure comes from ("data sheet", or "measured" by a matmul)."""
    gpu = _gpu()
    if gpu is not None:
        return gpu.flops_per_second, "data sheet"
    size = 1024
    return 2 * size**3 / _seconds(lambda a: a @ a, jnp.ones((size, size), dtype)), "measured"


def peak_bytes_per_second() -> tuple[float, str]:
    """Memory bandwidth of the first device, likewise; measured by reading and writing 128 MB in place."""
    gpu = _gpu()
    if gpu is not None:
        return gpu.bytes_per_second, "data sheet"
    size = 2**25  # fp32: larger than a CPU's cache
    # In place: to a new array, a CPU's kernel would hand out pages at an eighth of the speed.
    return 2 * 4 * size / _seconds(lambda a: a + 1, jnp.ones(size, jnp.float32), in_place=True), "measured"


def _gpu() -> gpus.GPU | None:
    """The first device's data sheet, if it is a GPU that has one here."""
    device = jax.local_devices()[0]
    return gpus.of_device_kind(device.device_kind) if device.platform == "gpu" else None


def _seconds(function: Callable[[jax.Array], jax.Array], x: jax.Array, *, in_place: bool = False) -> float:
    """The best of a few runs; in place: each overwrites the result of the one before."""
    compiled = jax.jit(function, donate_argnums=0 if in_place else ())
    best = math.inf
    for run in range(6):
        start = time.perf_counter()
        y = compiled(x).block_until_ready()
        best = min(best, time.perf_counter() - start) if run else best  # the first one compiles
        x = y if in_place else x
    return best
