"""FLOPs and bytes of a compiled step, counted from its instructions for a given routing: no clock, no trace, no device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from models.config import Architecture
from models.ops import grouped_matmul as gm
from moejax.profiling.program import Cost, Program, module_of
from moejax.profiling.scopes import Place


def uniform_loads(config: Architecture, tokens: int) -> np.ndarray:
    """Tokens of each expert if every one has its share: [E]."""
    return np.full(config.num_experts, tokens * config.experts_per_token // config.num_experts)


def tile_trips(plan: gm.Plan, loads: np.ndarray) -> Callable[[str], float]:
    """How often the grouped products' two loops run for `loads` [..., E] (tokens of an expert): the mean over everything in it. The
    answer is for a loop's path; one that is none of the two raises ValueError."""
    whole = loads // plan.tile
    small = -(-(loads - whole * plan.tile) // plan.small_tile)

    def trips(path: str) -> float:
        if "small_tiles" in path:
            return float(np.mean(small))
        if "tiles" in path:
            return float(np.mean(whole))
        raise ValueError(f"{path or 'a loop without a path'}: how often this loop runs is not known")

    return trips


def costs(compiled: Any, plan: gm.Plan | None, loads: np.ndarray) -> dict[Place, Cost]:
    """FLOPs and bytes of one run of a train step, by phase and stage. plan: of its grouped products, None for a dense step; loads: see
    `tile_trips`. Raises ValueError for the backend `capacity`, whose branch depends on the routing."""
    if plan is not None and plan.backend == "capacity":
        raise ValueError("backend capacity: which of its branches runs is not in the program")
    return Program(module_of(compiled)).costs({}, None if plan is None else tile_trips(plan, loads))


def total(found: dict[Place, Cost]) -> Cost:
    """The sum over all places."""
    return sum(found.values(), Cost())
