"""The plan of a grouped MLP for a device and size: what `choice` says, or what is asked for."""

from __future__ import annotations

import math

from moejax.models.ops import choice
from moejax.models.ops.expert_tile import Plan

BACKENDS = ("loop", "capacity", "ragged")
CAPACITIES = (1.125, 1.5, 2.0)
"""Rows per expert that `capacity` is compiled for, in mean loads; a larger load goes through the loop."""


def choose(
    backend: str,
    platform: str,
    tokens: int,
    experts: int,
    experts_per_token: int,
    *,
    hidden: int = 1024,
    intermediate: int = 1024,
    quantized: bool = False,
) -> Plan:
    """The plan for this device and size. Raises ValueError for a backend that does not exist.

    platform: "cpu", "gpu", or a GPU's kind. A forced backend takes its tile from the table all the same.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"moe_backend = {backend!r}: expected one of {['auto', *BACKENDS]}")
    found, tile, small_tile = choice.grouped(
        platform, tokens, experts, experts_per_token, hidden=hidden, intermediate=intermediate, quantized=quantized
    )
    mean_group = max(1, tokens * experts_per_token // experts)
    capacities = sorted({min(tokens, 8 * math.ceil(mean_group * c / 8)) for c in CAPACITIES})
    return Plan(found if backend == "auto" else backend, tile, small_tile, capacities=tuple(capacities))
