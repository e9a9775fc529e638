"""Compile the real train step for a target, without weights and without the device; read its memory.

The extra `aot` brings the CUDA plugin and ptxas: a machine without a GPU compiles for an H100, an A100 … by their description
(XLA's GpuTargetConfigProto in text form). Nothing runs: no speed can be read from it, and no kernel is autotuned.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from models.build import build
from models.config import Architecture
from moejax.config import Experiment
from moejax.data.batch import Batch
from moejax.errors import UserError
from moejax.training.memory import compiler_peak_bytes
from moejax.training.optimizer import make_optimizer, make_schedule
from moejax.training.state import initial_state, model_arguments, objective, split
from moejax.training.step import make_train_step


@dataclass(frozen=True)
class Target:
    """A GPU as the compiler needs to know it (vendor data sheets and XLA's own device specs)."""

    name: str
    compute_capability: str  # text form of cuda_compute_capability
    cores: int
    fpus_per_core: int
    shared_memory_per_core: int
    shared_memory_per_block_optin: int
    threads_per_core: int
    bandwidth: int  # bytes/s
    l2_bytes: int
    clock_ghz: float
    memory_bytes: int


TARGETS = {
    "H100": Target(
        "NVIDIA H100 80GB HBM3", "major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES", 132, 128, 233472, 232448, 2048,
        3352320000000, 52428800, 1.98, 84942979072,
    ),
    "A100-80": Target(
        "NVIDIA A100-SXM4-80GB", "major: 8 minor: 0", 108, 64, 167936, 166912, 2048, 2039040000000, 41943040, 1.41, 85100068864
    ),
    "A40": Target("NVIDIA A40", "major: 8 minor: 6", 84, 128, 102400, 101376, 1536, 696000000000, 6291456, 1.74, 47608692736),
    "L4": Target("NVIDIA L4", "major: 8 minor: 9", 58, 128, 102400, 101376, 1536, 300096000000, 50331648, 2.04, 23609475072),
}  # fmt: skip
# The same chips with other memory: XLA's device specs differ in these two figures only.
TARGETS["A100-40"] = replace(
    TARGETS["A100-80"], name="NVIDIA A100-SXM4-40GB", bandwidth=1555000000000, memory_bytes=42500000000
)
TARGETS["H200"] = replace(TARGETS["H100"], name="NVIDIA H200", bandwidth=4800000000000, memory_bytes=151400000000)


def target_text(target: Target) -> str:
    """The target as GpuTargetConfigProto text."""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {target.shared_memory_per_core}
  threads_per_core_limit: {target.threads_per_core}
  core_count: {target.cores}
  fpus_per_core: {target.fpus_per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {target.bandwidth}
  l2_cache_size: {target.l2_bytes}
  clock_rate_ghz: {target.clock_ghz}
  device_memory_size: {target.memory_bytes}
  shared_memory_per_block_optin: {target.shared_memory_per_block_optin}
  cuda_compute_capability {{ {target.compute_capability} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{target.name}"
"""


def device(name: str) -> Any:
    """An abstract device of that name. Raises UserError for an unknown one, or where the extra `aot` is missing."""
    if name not in TARGETS:
        raise UserError(f"GPU {name!r} is unknown here: expected one of {', '.join(TARGETS)}")
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(platform="cuda", target_config=target_text(TARGETS[name]), topology="1x1x1")
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise UserError(
            f"cannot compile for {name} on this machine ({str(error).splitlines()[0]}): install the extra, pip install -e '.[aot]', "
            "with jax-cuda12-plugin of jaxlib's version, and set JAX_PLATFORMS=cpu"
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
    experiment: Experiment, config: Architecture, *, rows: int, row_tokens: int, gpu: str | None,
    compiler: Callable[[Any], Any] = lambda lowering: lowering.compile(),
) -> Compiled:  # fmt: skip
    """Compile one optimizer step of this experiment for `gpu` (None: this machine's device) from shapes alone.

    compiler: what makes an executable of the lowering; for a trace, `profiling.capture.compile_profiled`.
    """
    # Here without a sharding, as a run's own arguments have none: it is then the same program, and a cache on disk finds it.
    sharding = None if gpu is None else SingleDeviceSharding(device(gpu))
    platform = None if gpu is None else TARGETS[gpu].name
    model = build(config, **model_arguments(experiment), platform=platform)
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
    program = compiler(jax.jit(step, donate_argnums=(0,)).lower(*arguments))
    seconds = time.perf_counter() - start
    analysis: Any = program.memory_analysis()
    return Compiled(
        compiler_peak_bytes(program), analysis.argument_size_in_bytes, analysis.temp_size_in_bytes, seconds, program
    )
