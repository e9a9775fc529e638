"""This machine's first device: its name, its memory, its peaks. jax is imported where it is asked: a setting may still come before."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from moejax.errors import UserError
from moejax.gpus import GPU, GPUS, gpu_name, of_device_kind, platform_of_capability

if TYPE_CHECKING:
    from collections.abc import Callable

    import jax

HERE = "here"  # --gpu: this machine's own


def cpu_name() -> str:
    """The CPU's model, and how many cores this process may use."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} core{'' if cores == 1 else 's'}"


def name() -> str:
    """The first device as records call it: its kind, or the CPU's model and cores."""
    import jax

    device = jax.local_devices()[0]
    return cpu_name() if device.platform == "cpu" else str(device.device_kind)


def size_bytes() -> int:
    """All memory of the first device, of which jax may use XLA_CLIENT_MEM_FRACTION; of a CPU, the machine's."""
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return round(stats["bytes_limit"] / float(os.environ.get("XLA_CLIENT_MEM_FRACTION", "0.75")))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def usable_bytes() -> int | None:
    """What this process may use of the first device; on a CPU what the system says is available. None where unknown."""
    import jax

    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    host = host_bytes()
    return host[1] if device.platform == "cpu" and host else None


def free_bytes() -> int | None:
    """What is left of `usable_bytes` by the device's allocator; None where it does not say."""
    import jax

    stats = jax.local_devices()[0].memory_stats()
    return int(stats["bytes_limit"]) - int(stats["bytes_in_use"]) if stats and "bytes_limit" in stats else None


def host_bytes() -> tuple[int, int] | None:
    """The machine's memory, and what of it the system says is available; None where it does not say."""
    information = Path("/proc/meminfo")
    if not information.exists():
        return None
    fields = dict(line.split(":", 1) for line in information.read_text(encoding="utf-8").splitlines())
    total, available = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    return total, available


def return_freed() -> None:
    """What glibc's malloc keeps of freed memory goes back to the system: a compiler and a checkpoint's writers leave hundreds of MB, in an
    arena for each of their threads. Nothing with another malloc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def memory_bytes() -> dict[str, int]:
    """Peak memory of the device; on a CPU, whose allocator does not say, the peak resident memory of this process."""
    import jax

    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return {"device_peak_bytes": stats["peak_bytes_in_use"], "device_bytes": stats["bytes_in_use"]}
    return {"host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)}


def peak_flops(dtype: str) -> tuple[float, str]:
    """Peak FLOP/s of the first device and where the figure comes from ("data sheet", or "measured" by a matmul)."""
    import jax.numpy as jnp

    gpu = _gpu()
    if gpu is not None:
        return gpu.rate(dtype), "data sheet"
    size = 1024
    return 2 * size**3 / _seconds(lambda a: a @ a, jnp.ones((size, size), dtype)), "measured"


def peak_bytes_per_second() -> tuple[float, str]:
    """Memory bandwidth of the first device, likewise; measured by reading and writing 128 MB in place."""
    import jax.numpy as jnp

    gpu = _gpu()
    if gpu is not None:
        return gpu.bytes_per_second, "data sheet"
    size = 2**25  # fp32: larger than a CPU's cache
    # In place: to a new array, a CPU's kernel would hand out pages at an eighth of the speed.
    return 2 * 4 * size / _seconds(lambda a: a + 1, jnp.ones(size, jnp.float32), in_place=True), "measured"


def _gpu() -> GPU | None:
    """The first device's data sheet, if it is a GPU that has one here."""
    import jax

    device = jax.local_devices()[0]
    return of_device_kind(device.device_kind) if device.platform == "gpu" else None


def _seconds(function: Callable[[jax.Array], jax.Array], x: jax.Array, *, in_place: bool = False) -> float:
    """The best of a few runs; in place: each overwrites the result of the one before."""
    import jax

    compiled = jax.jit(function, donate_argnums=0 if in_place else ())
    best = math.inf
    for run in range(6):
        start = time.perf_counter()
        y = compiled(x).block_until_ready()
        best = min(best, time.perf_counter() - start) if run else best  # the first one compiles
        x = y if in_place else x
    return best


def this_machine(fraction: float) -> GPU:
    """This machine's device: its card of the table where it is one, else with nothing but its name; with what jax may use of its memory,
    at this share. Raises UserError where that is not known."""
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", str(fraction))  # before jax is imported
    import jax

    device, usable = jax.local_devices()[0], usable_bytes()
    if usable is None:
        raise UserError(f"--gpu {HERE}: this machine does not say how much memory it has; give a GPU's name")
    known = GPUS.get(gpu_name(device.device_kind))
    if known is not None:
        return dataclasses.replace(known, usable_bytes=usable)
    here = GPU(cpu_name(), usable / 1e9, 1.0, 1.0, HERE, usable_bytes=usable, platform="cpu", source="this machine")
    if device.platform == "cpu":
        return here
    capability = str(getattr(device, "compute_capability", ""))
    bf16 = not capability[:1].isdigit() or float(capability) >= 8
    return dataclasses.replace(here, name=device.device_kind, platform=platform_of_capability(capability), bf16=bf16)


def this_machine_timed(own: bool) -> GPU:
    """The same for a prediction of time: a device of no table has its peaks measured. `own`: there are coefficients of the user's.

    Raises UserError for a CPU without them: the study's are of GPUs.
    """
    from moejax.config import DeviceConfig

    gpu = this_machine(DeviceConfig().memory_fraction)
    if gpu.platform == "cpu" and not own:
        raise UserError(
            f"--gpu {HERE}: this machine has a CPU only ({gpu.name}), and the study's times are of GPUs: profile your own runs here "
            "(moejax profile CONFIG, moejax estimate fit RUN…, then --coefficients FILE), or name a GPU; `memory --gpu here` says what fits"
        )
    return with_peaks(gpu)


def with_peaks(gpu: GPU) -> GPU:
    """This machine's device as `this_machine` has it; the peaks of one of no table are measured."""
    if gpu.source != "this machine":
        return gpu
    (peak, _), (rate, _) = peak_flops("float32" if gpu.platform == "cpu" else "bfloat16"), peak_bytes_per_second()
    return dataclasses.replace(gpu, flops_per_second=peak, bytes_per_second=rate, source="measured here")
