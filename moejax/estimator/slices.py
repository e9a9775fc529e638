"""A config on a slice of TPU chips: what runs there, and what each mode of the mesh leaves on a chip. No jax."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moejax.config_mesh import MeshConfig
from moejax.errors import UserError
from moejax.tpus import Slice

if TYPE_CHECKING:
    from moejax.config import Experiment
    from moejax.models.config import Architecture

MODES = ("spread", "experts", "whole")


def check(slice_: Slice, experiment: Experiment, tool: str = "moejax", devices: object = None) -> None:
    """Raises UserError for what is asked that runs on GPUs alone, by what runs there, and for --devices next to a slice's own number."""
    if tool != "moejax":
        raise UserError(f"--tool {tool}: has no receipt of a TPU ({slice_.name}): expected --tool moejax, or GPUs")
    if devices is not None:
        raise UserError(f"--devices {devices}: {slice_.name} is a slice of {slice_.count} chips: expected no --devices with it")
    if experiment.model.scan == "kernel":
        raise UserError(f"model.scan = kernel is for GPUs, and {slice_.name} is a TPU: expected auto (there chunked_associative)")


def precision(experiment: Experiment) -> list[str]:
    """A line where products are asked in fp32."""
    if experiment.training.compute_dtype != "float32":
        return []
    return ["training.compute_dtype = float32: a TPU rounds what it multiplies to bfloat16 (docs/tpu.md): expected bfloat16"]


def modes(slice_: Slice, experiment: Experiment, config: Architecture) -> tuple[list[Experiment], list[str]]:
    """(the experiment on the slice, once by each mode of `mesh.weights` that it may have; why not by the others). One chip has no mode."""
    if slice_.count == 1:
        return [experiment.model_copy(update={"mesh": None})], []
    found, refused = [], []
    for weights in MODES:
        mesh = (experiment.mesh or MeshConfig.model_validate({})).model_copy(update={"devices": slice_.count, "weights": weights})
        try:
            mesh.model_copy(update={"devices": None}).check(experiment)  # rows are the caller's
            mesh.check_experts(slice_.count, config.num_experts)
        except ValueError as error:
            refused.append(f"{slice_.name}, {weights}: {error}")
            continue
        found.append(experiment.model_copy(update={"mesh": mesh}))
    return found, refused
