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

    The grouped products' two loops over tiles and, of the backend `capacity`, the branch that the largest load takes. For anything else
    the answer raises ValueError.
    """
    loads = loads.reshape(-1, loads.shape[-1])
    capacities = plan.capacities if plan.backend == "capacity" else ()
    taken = np.sum(loads.max(axis=1, keepdims=True) > np.asarray(capacities), axis=1)
    loops = loads[taken == len(capacities)]
    whole = loops // plan.tile
    small = -(-(loops - whole * plan.tile) // plan.small_tile)

    def trips(path: str, branch: int | None) -> float:
        if branch is not None and capacities and path.endswith("moe/cond"):
            return float(np.mean(taken == branch))
        if branch is None and "tiles" in path:
            counts = small if "small_tiles" in path else whole
            return float(np.mean(counts)) if counts.size else 0.0
        what = "loop" if branch is None else "conditional"
        raise ValueError(f"{path or f'a {what} without a path'}: how often this {what} runs is not known")

    return trips


def costs(compiled: Any, plan: gm.Plan | None, loads: np.ndarray) -> dict[Place, Cost]:
    """FLOPs and bytes of one run of a train step, by phase and stage. plan: of its grouped products, None for a dense step; loads: see
    `routed`."""
    return Program(module_of(compiled)).costs({}, None if plan is None else routed(plan, loads))


def total(found: dict[Place, Cost]) -> Cost:
    """The sum over all places."""
    return sum(found.values(), Cost())
