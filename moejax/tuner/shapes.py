"""Of a run, the sizes that all operations ask for: those of the longest row, on one device."""

from __future__ import annotations

from moejax.config import Experiment


def rows_of(experiment: Experiment) -> tuple[int, int]:
    """Rows of a micro-batch on one device, and their tokens."""
    devices = 1 if experiment.mesh is None else experiment.mesh.devices or 1
    return max(1, experiment.data.batch_rows // devices), experiment.data.longest_row


def tokens_of(experiment: Experiment) -> int:
    """That pass a layer at a time."""
    rows, length = rows_of(experiment)
    return rows * length * experiment.training.together
