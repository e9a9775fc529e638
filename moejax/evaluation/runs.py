"""A finished run's folder: its experiment, and its tuned model."""

from __future__ import annotations

from pathlib import Path

from models.build import Model
from models.config import Architecture
from moejax import config as experiments
from moejax.config import Experiment
from moejax.errors import UserError
from moejax.hub import peft
from moejax.training.state import create_model


def open_run(folder: Path) -> Experiment:
    """The experiment of a finished run. Raises UserError where there is none."""
    if not (folder / "config.yaml").is_file() or not any((folder / part).is_dir() for part in ("adapter", "model")):
        raise UserError(f"{folder} is no finished run (expected config.yaml, and adapter/ or model/, in it)")
    return experiments.load(folder / "config.yaml")


def tuned(experiment: Experiment, sizes: Architecture, folder: Path, base: Model) -> Model:
    """The model that the run in `folder` trained. With an adapter it is `base`, changed in place."""
    if experiment.adapter is None:
        return create_model(experiment, sizes, folder / "model")
    peft.load_adapter(base, folder / "adapter")
    return base
