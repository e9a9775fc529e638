"""Compile the real train step for a target, without weights and without the device; read its memory.

The extra `aot` brings the CUDA plugin and ptxas: a machine without a GPU compiles for an H100, an A100 … by their description
(estimator/targets.py). Nothing runs: no speed can be read from it, and no kernel is autotuned.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from moejax import installation
from moejax.config import Experiment
from moejax.data.batch import Batch
from moejax.errors import UserError, first_line
from moejax.estimator.targets import target_text
from moejax.gpus import GPU, GPUS
from moejax.hub.model import model_arguments
from moejax.models.build import build
from moejax.models.config import Architecture
from moejax.training.compile import step_of, told
from moejax.training.memory import compiler_peak_bytes
from moejax.training.optimizer import make_optimizer, make_schedule
from moejax.training.state import initial_state, objective, split
from moejax.training.step import make_train_step


def device(gpu: str | GPU) -> Any:
    """An abstract device of that name. Raises UserError for an unknown one, or where the extra `aot` is missing."""
    if isinstance(gpu, str):
        if gpu not in GPUS:
            raise UserError(f"GPU {gpu!r} is unknown here: expected one of {', '.join(GPUS)}")
        gpu = GPUS[gpu]
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(platform="cuda", target_config=target_text(gpu), topology="1x1x1")
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise UserError(
            f"cannot compile for {gpu.name} on this machine ({first_line(error)}): install the extra `aot` "
            f"({installation.for_extra('aot')}), and set JAX_PLATFORMS=cpu"
        ) from error
    return topology.devices[0]


def machine() -> str:
    """This machine's device as jax names it."""
    return str(jax.local_devices()[0].device_kind)


@dataclass(frozen=True)
class Compiled:
    """What compiling said. Bytes by the compiler; `program` is its executable."""

    peak_bytes: int
    argument_bytes: int
    temporary_bytes: int
    compile_seconds: float
    program: Any


def compile_step(
    experiment: Experiment, config: Architecture, *, rows: int, row_tokens: int, gpu: str | GPU | None,
    compiler: Callable[[Any], Any] = lambda lowering: lowering.compile(),
) -> Compiled:  # fmt: skip
    """Compile one optimizer step of this experiment for `gpu` (None: this machine's device) from shapes alone. Raises UserError where
    the compiler fails.

    compiler: what makes an executable of the lowering; for a trace, `profiling.capture.compile_profiled`.
    """
    # Here without a sharding, as a run's own arguments have none: it is then the same program, and a cache on disk finds it.
    sharding = None if gpu is None else SingleDeviceSharding(device(gpu))
    card = GPUS[gpu] if isinstance(gpu, str) else gpu
    platform, memory_bytes = (None, None) if card is None else (card.cuda_name, card.memory_bytes)
    model = build(config, **model_arguments(experiment), platform=platform, memory_bytes=memory_bytes)
    graphdef, trainable, frozen = split(model, full=experiment.adapter is None)
    schedule = make_schedule(experiment.training, experiment.training.steps or 1000)
    optimizer = make_optimizer(experiment.training, schedule)
    step = make_train_step(objective(experiment, graphdef), optimizer, schedule, experiment.seed)
    state = jax.eval_shape(lambda t: initial_state(t, optimizer), trainable)
    shape = (experiment.training.gradient_accumulation, rows, row_tokens)
    integers = jax.ShapeDtypeStruct(shape, jnp.int32)
    batch = Batch(integers, integers, jax.ShapeDtypeStruct(shape, jnp.float32), integers, integers)
    arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), (state, frozen, batch))
    start = time.perf_counter()
    with told(step_of(experiment, rows, row_tokens), platform or machine()):
        program = compiler(jax.jit(step, donate_argnums=(0,)).lower(*arguments))
    seconds = time.perf_counter() - start
    analysis: Any = program.memory_analysis()
    return Compiled(
        compiler_peak_bytes(program), analysis.argument_size_in_bytes, analysis.temp_size_in_bytes, seconds, program
    )
