"""GPUs as XLA's compiler needs to know them (GpuTargetConfigProto in text form), for compiling where they are not.

A card's figures are those of gpus.py. What a multiprocessor has follows from the compute capability (CUDA programming guide, technical
specifications). No jax here.
"""

from __future__ import annotations

from typing import NamedTuple

from moejax.gpus import GPU


class Multiprocessor(NamedTuple):
    """fp32 units, bytes of shared memory in all and for one block that asks for them, threads."""

    fpus: int
    shared_bytes: int
    shared_bytes_of_a_block: int
    threads: int


_SMALL, _LARGE = Multiprocessor(128, 102400, 101376, 1536), Multiprocessor(128, 233472, 232448, 2048)
MULTIPROCESSORS = {
    "7.0": Multiprocessor(64, 98304, 98304, 2048),
    "7.5": Multiprocessor(64, 65536, 65536, 1024),
    "8.0": Multiprocessor(64, 167936, 166912, 2048),
    "8.6": _SMALL, "8.9": _SMALL, "9.0": _LARGE, "10.0": _LARGE, "10.3": _LARGE, "12.0": _SMALL, "12.1": _SMALL,
}  # fmt: skip
_ACCELERATED = ("9.0", "10.0", "10.3")  # these have instructions of their own (wgmma, tcgen05), which no later chip runs


def target_text(gpu: GPU) -> str | None:
    """The GPU as GpuTargetConfigProto text; None without figures for a compiler, and for a compute capability that is not known here."""
    c = gpu.compiler
    if c is None or c.compute_capability not in MULTIPROCESSORS:
        return None
    sm = MULTIPROCESSORS[c.compute_capability]
    major, _, minor = c.compute_capability.partition(".")
    extension = " feature_extension: ACCELERATED_FEATURES" if c.compute_capability in _ACCELERATED else ""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {sm.shared_bytes}
  threads_per_core_limit: {sm.threads}
  core_count: {c.multiprocessors}
  fpus_per_core: {sm.fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(gpu.bytes_per_second)}
  l2_cache_size: {int(c.l2_mb * 2**20)}
  clock_rate_ghz: {c.clock_ghz}
  device_memory_size: {gpu.memory_bytes}
  shared_memory_per_block_optin: {sm.shared_bytes_of_a_block}
  cuda_compute_capability {{ major: {major} minor: {minor}{extension} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{gpu.cuda_name}"
"""
