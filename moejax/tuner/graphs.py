"""Loops over tiles inside CUDA graphs, or on the host: a GPU's only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moejax import compiler_options
from moejax.config import Experiment
from moejax.models.config import Architecture
from moejax.tuner import experts
from moejax.tuner.registry import Candidate, Case


def shapes(experiment: Experiment, config: Architecture) -> list[dict[str, Any]]:
    return experts.shapes(experiment, config) if compiler_options.nvidia_asked() else []


def candidates(device: str, shape: dict[str, Any]) -> list[Candidate]:
    return [Candidate("loops on the host", {"loops": "host"}), Candidate("loops in CUDA graphs", {"loops": "graphs"})]


def build(device: str, shape: dict[str, Any], entry: dict[str, Any]) -> Any:
    """As `experts.build`, of its portable path."""
    kinds = str(compiler_options.GPU_OPTIONS["xla_gpu_enable_command_buffer"])
    chosen = kinds if entry["loops"] == "graphs" else kinds.replace(",WHILE", "")
    return experts.build(
        device, shape, experts.candidates(device, shape)[0].entry, compiler_options.GPU_OPTIONS | {"xla_gpu_enable_command_buffer": chosen}
    )


def cases(shape: dict[str, Any]) -> Iterator[Case]:
    yield from experts.cases(shape)
