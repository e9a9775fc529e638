"""How a run's experts are multiplied: the backend and its tile for the run's batch, told at the start, refused where it cannot work."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from moejax.config import Experiment
from moejax.errors import UserError
from moejax.estimator.sizes import ITEM
from moejax.models.config import Architecture
from moejax.models.ops.choice import here, measured, memory_here
from moejax.models.ops.grouped.matmul import Plan, choose
from moejax.models.ops.grouped.ragged import ragged_dot
from moejax.profiling.program import Program, module_of

DENSE_FROM = 2.0
"""Of a grouped product's useful FLOPs: from here on the compiler has made a dense one of it."""


def plan(experiment: Experiment, config: Architecture, tokens: int) -> Plan | None:
    """What `moejax.models.moe` will choose here for so many tokens; None where all experts see all tokens."""
    if config.experts_per_token == config.num_experts:
        return None
    return choose(
        experiment.model.moe_backend, here(), tokens, config.num_experts, config.experts_per_token,
        hidden=config.hidden_size, intermediate=config.intermediate_size, quantized=experiment.quantization.of_experts,
        item=ITEM[experiment.training.compute_dtype], memory_bytes=memory_here(),
    )  # fmt: skip


def backend(experiment: Experiment, config: Architecture, tokens: int) -> str:
    """The backend's name, "dense" where there is nothing to group."""
    chosen = plan(experiment, config, tokens)
    return "dense" if chosen is None else chosen.backend


def announce(experiment: Experiment, config: Architecture) -> str:
    """One line for the start of a run. Raises UserError for a backend that is no use on this device."""
    tokens = experiment.data.batch_rows * experiment.data.longest_row
    chosen = plan(experiment, config, tokens)
    if chosen is None:
        return "experts: dense, every token through every expert in batched products"
    if chosen.backend == "ragged":
        refuse_dense(ragged_cost(), here())
    rows = tokens * config.experts_per_token // config.num_experts
    entry = measured(here(), rows, config.hidden_size * config.intermediate_size, experiment.quantization.of_experts)
    source = f"not measured on {here()}" if entry is None else f"measured: {entry['measured']}"
    why = f"auto, {source}" if experiment.model.moe_backend == "auto" else "model.moe_backend"
    what = {
        "loop": f"tiles of {chosen.tile} and {chosen.small_tile} rows",
        "capacity": f"{chosen.capacity} rows an expert in one batch, the rest in tiles of {chosen.tile}",
        "ragged": "XLA's own grouped product",
    }[chosen.backend]
    return f"experts: {chosen.backend}, {what} ({why})"


def ragged_cost(device: Any = None) -> float:
    """FLOPs that the compiler makes of a `ragged_dot` over 8 experts for `device` (default: the first one here), of the useful ones."""
    rows, size, experts = 512, 64, 8
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0] if device is None else device)

    def shape(*dims: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    arguments = (shape(rows, size), shape(experts, size, size), shape(experts, dtype=jnp.int32))
    program = Program(module_of(jax.jit(ragged_dot).lower(*arguments).compile()))
    return sum(cost.flops for cost in program.costs({}).values()) / (2 * rows * size * size)


def refuse_dense(cost: float, device: str) -> None:
    """Raises UserError where a grouped product is compiled to a dense one."""
    if cost >= DENSE_FROM:
        raise UserError(
            f"model.moe_backend = 'ragged': on {device} the compiler makes a dense product of it, {cost:.1f} times the useful FLOPs "
            "(8 experts); expected a grouped one. Use auto, loop or capacity, which run on every device"
        )
