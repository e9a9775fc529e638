"""GPUs as XLA's compiler needs to know them (GpuTargetConfigProto in text form), for compiling where they are not.

Of a card: compute capability, multiprocessors, second-level cache and boost clock, by XLA's own device specs where there is one (A100,
H100, B200, A6000, V100), else by the vendor's data sheet; bandwidth and memory are those of gpus.py. What a multiprocessor has follows
from the compute capability (CUDA programming guide, technical specifications). No jax here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from moejax.gpus import GPU, GPUS, CompilerFigures


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


@dataclass(frozen=True)
class Target:
    """A GPU as the compiler needs to know it. `name`: as CUDA reports it; bandwidth in bytes/s."""

    name: str
    compute_capability: str
    cores: int
    l2_bytes: int
    clock_ghz: float
    bandwidth: int
    memory_bytes: int


def _of(gpu: GPU, name: str, c: CompilerFigures) -> Target:
    memory = gpu.device_bytes or int(gpu.memory_gb * 1e9)
    return Target(
        f"NVIDIA {name}".replace("NVIDIA Tesla", "Tesla"), c.compute_capability, c.multiprocessors, int(c.l2_mb * 2**20), c.clock_ghz,
        int(gpu.bytes_per_second), memory,
    )  # fmt: skip


_TABLE: tuple[tuple[str, str, str, int, float, float], ...] = (
    ("H100", "H100 80GB HBM3", "9.0", 132, 50, 1.98),
    ("H100-PCIe", "H100 PCIe", "9.0", 114, 50, 1.755),
    ("H100-NVL", "H100 NVL", "9.0", 132, 60, 1.785),
    ("GH200", "GH200 480GB", "9.0", 132, 60, 1.98),
    ("H200", "H200", "9.0", 132, 50, 1.98),
    ("B200", "B200", "10.0", 148, 126.5, 1.965),
    ("A100-80", "A100-SXM4-80GB", "8.0", 108, 40, 1.41),
    ("A100-40", "A100-SXM4-40GB", "8.0", 108, 40, 1.41),
    ("A40", "A40", "8.6", 84, 6, 1.74),
    ("A6000", "RTX A6000", "8.6", 84, 6, 1.8),
    ("A10G", "A10G", "8.6", 80, 6, 1.71),
    ("RTX-3090", "GeForce RTX 3090", "8.6", 82, 6, 1.695),
    ("RTX-A2000-12", "RTX A2000 12GB", "8.6", 26, 3, 1.2),
    ("L4", "L4", "8.9", 58, 48, 2.04),
    ("L40S", "L40S", "8.9", 142, 96, 2.52),
    ("RTX-4090", "GeForce RTX 4090", "8.9", 128, 72, 2.52),
    ("RTX-6000-Ada", "RTX 6000 Ada Generation", "8.9", 142, 96, 2.505),
    ("RTX-5090", "GeForce RTX 5090", "12.0", 170, 96, 2.407),
    ("RTX-PRO-6000", "RTX PRO 6000 Blackwell Workstation Edition", "12.0", 188, 128, 2.6),
    ("T4", "Tesla T4", "7.5", 40, 4, 1.59),
    ("V100-16", "Tesla V100-SXM2-16GB", "7.0", 80, 6, 1.53),
    ("V100-32", "Tesla V100-SXM2-32GB", "7.0", 80, 6, 1.53),
)  # fmt: skip

TARGETS = {key: _of(GPUS[key], name, CompilerFigures(*figures)) for key, name, *figures in _TABLE}  # type: ignore[arg-type]


def target_of(gpu: GPU) -> Target | None:
    """The target of a GPU of the table, or of one of a user's file with figures for the compiler; None without them, and for a compute
    capability that is not known here."""
    if GPUS.get(gpu.name) == gpu:
        return TARGETS.get(gpu.name)
    c = gpu.compiler
    return None if c is None or c.compute_capability not in MULTIPROCESSORS else _of(gpu, gpu.name, c)


def target_text(target: Target) -> str:
    """The target as GpuTargetConfigProto text."""
    sm = MULTIPROCESSORS[target.compute_capability]
    major, _, minor = target.compute_capability.partition(".")
    extension = " feature_extension: ACCELERATED_FEATURES" if target.compute_capability in _ACCELERATED else ""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {sm.shared_bytes}
  threads_per_core_limit: {sm.threads}
  core_count: {target.cores}
  fpus_per_core: {sm.fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {target.bandwidth}
  l2_cache_size: {target.l2_bytes}
  clock_rate_ghz: {target.clock_ghz}
  device_memory_size: {target.memory_bytes}
  shared_memory_per_block_optin: {sm.shared_bytes_of_a_block}
  cuda_compute_capability {{ major: {major} minor: {minor}{extension} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{target.name}"
"""
