"""Devices that are not there, for which programs are compiled, and the memory of their host."""

from __future__ import annotations

import os
from typing import Any

from jax.sharding import NamedSharding

from moejax import installation, tpus
from moejax.errors import UserError, first_line
from moejax.estimator.targets import target_text
from moejax.gpus import GPU, GPUS
from moejax.models.ops import host


class Pinned(NamedSharding):
    """Pinned host memory next to a device that is not there. Such a device names no memories, and jax then forgets the kind that a sharding
    is given: this one says it whenever jax asks, and the program is lowered as on a machine that has the device."""

    @property
    def memory_kind(self) -> str:
        return host.KIND


def device(gpu: str | GPU) -> Any:
    """`devices` of one."""
    return devices(gpu, 1)[0]


def devices(gpu: str | GPU, count: int) -> list[Any]:
    """Abstract devices of that name, in one process. Raises UserError for an unknown one, or where the extra `aot` is missing."""
    if isinstance(gpu, str):
        if gpu not in GPUS:
            raise UserError(f"GPU {gpu!r} is unknown here: expected one of {', '.join(GPUS)}")
        gpu = GPUS[gpu]
    from jax.experimental import topologies

    tpu = gpu.platform == "tpu"
    try:
        if tpu:
            os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else libtpu asks the network what machine this is
            os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is taken: several processes may compile at once
            return list(topologies.get_topology_desc(tpus.of(gpu, count).topology, platform="tpu").devices)[:count]
        topology = topologies.get_topology_desc(platform="cuda", target_config=target_text(gpu), topology=f"1x1x{count}")
    except (RuntimeError, NotImplementedError, ValueError) as error:
        extra = "aot-tpu" if tpu else "aot"
        raise UserError(
            f"cannot compile for {gpu.name} on this machine ({first_line(error)}): install the extra `{extra}` "
            f"({installation.for_extra(extra)}), and set JAX_PLATFORMS=cpu"
        ) from error
    return list(topology.devices)
