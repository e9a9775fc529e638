"""FLOPs and bytes of a compiled step, counted from its instructions for a given routing: no clock, no trace, no device."""

from __future__ import annotations

from typing import Any

import numpy as np

from moejax.models.config import Architecture
from moejax.models.ops.grouped import matmul as gm
from moejax.profiling.program import Cost, Program, Trips, module_of
from moejax.profiling.scopes import Place


def uniform_loads(config: Architecture, tokens: int) -> np.ndarray:
    """Tokens of each expert if every one has its share: [E]."""
    return np.full(config.num_experts, tokens * config.experts_per_token // config.num_experts)


def routed(plan: gm.Plan, loads: np.ndarray) -> Trips:
    """How often what depends on the routing runs, for `loads` [..., E] (tokens of an expert): the mean over all routings in it.

    The loops over tiles: an expert's two, or of the backend `capacity` a layer's one. For anything else the answer raises ValueError.
    """
    loads = loads.reshape(-1, loads.shape[-1])
    whole = (loads + plan.tile // 2) // plan.tile
    small = -(-np.maximum(loads - whole * plan.tile, 0) // plan.small_tile)
    if plan.backend == "capacity":
        whole = np.sum(-(-np.maximum(loads - plan.capacity, 0) // plan.tile), axis=1)

    def trips(path: str, branch: int | None) -> float:
        if branch is None and "tiles" in path:
            return float(np.mean(small if "small_tiles" in path else whole))
        what = "loop" if branch is None else "conditional"
        raise ValueError(f"{path or f'a {what} without a path'}: how often this {what} runs is not known")

    return trips


def costs(compiled: Any, plan: gm.Plan | None, loads: np.ndarray) -> dict[Place, Cost]:
    """FLOPs and bytes of one run of a train step, by phase and stage. plan: of its grouped products, None for a dense step; loads: see
    `routed`."""
    return Program(module_of(compiled)).costs({}, None if plan is None else routed(plan, loads))


def launches(compiled: Any, plan: gm.Plan | None, loads: np.ndarray) -> float:
    """Kernels, library calls and copies of one run of a train step; `costs` says of what."""
    return Program(module_of(compiled)).launches(None if plan is None else routed(plan, loads))


def total(found: dict[Place, Cost]) -> Cost:
    """The sum over all places."""
    return sum(found.values(), Cost())
