"""The devices that a run's model is asked on: those of its mesh, or others."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moejax import config as experiments
from moejax import mesh as meshes
from moejax import processes
from moejax.config import Experiment
from moejax.config_file import apply, explain
from moejax.config_mesh import MeshConfig
from moejax.config_values import Section
from moejax.errors import UserError
from moejax.models.config import Architecture


class _Asked(Section):
    mesh: MeshConfig | None = None


def mesh_of(folder: Path, changes: Sequence[str] = ()) -> MeshConfig | None:
    """How the model of a run's folder, or of a model's, is to lie on devices: as it was trained, on all that are here, or as `changes`
    (`mesh.key=value`, `mesh=null`) have it; None: on one device. Raises UserError for other changes, and for values that cannot be."""
    wrong = [text for text in changes if not text.startswith(("mesh.", "mesh="))]
    if wrong:
        raise UserError(f"{wrong[0]}: expected mesh.key=value, e.g. mesh.devices=2 (all else is as in the run's config), or mesh=null")
    own = experiments.load(folder / "config.yaml").mesh if (folder / "config.yaml").is_file() else None
    # Another machine may have fewer.
    content = {"mesh": None if own is None else own.model_dump(mode="json") | {"devices": None}}
    for text in changes:
        apply(content, text)
    try:
        return _Asked.model_validate(content).mesh
    except ValidationError as error:
        raise UserError(explain(error, _Asked)) from None


def joined(folder: Path, given: Mapping[str, Any] | None) -> MeshConfig | None:
    """`mesh_of` for a script, by keys of the section `mesh`. Several processes of it meet here, and part where they end; the first one
    alone reports. Raises UserError as `mesh_of`."""
    mesh = mesh_of(folder, [f"mesh.{key}={'null' if value is None else value}" for key, value in (given or {}).items()])
    if mesh is None and given is not None:  # {}: all devices, as in a config
        mesh = MeshConfig.model_validate({})
    own = None if mesh is None else mesh.model_dump(mode="json", include={"devices", "weights"})
    processes.join(mesh, {"model": json.dumps([str(folder), own])})
    return mesh


def alone(mesh: MeshConfig | None, what: str) -> None:
    """Raises UserError where several processes were started for what one does."""
    if processes.started_with(mesh):
        raise UserError(f"{what} is one process with all devices of its machine: start it without srun, mpirun and mesh.processes")


def devices_of(mesh: MeshConfig | None, sizes: Architecture, experiment: Experiment | None = None) -> meshes.Devices | None:
    """What a mesh is of this machine's devices, of all processes; None for one device. experiment: of a run, None of a model's folder.

    Raises UserError for devices that are not there, and for weights that do not lie so.
    """
    if mesh is None:
        return None
    devices = meshes.devices(mesh)
    if devices.count == 1:
        return None
    try:
        mesh.check_experts(devices.count, sizes.num_experts)
        if experiment is not None:
            mesh.model_copy(update={"devices": None}).check(experiment)
        elif mesh.weights == "spread":
            raise ValueError("mesh.weights = spread is of a run's frozen weights: expected experts or whole for a model's folder")
    except ValueError as error:
        raise UserError(str(error)) from None
    return devices
