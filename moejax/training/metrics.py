"""Metrics to `metrics.jsonl`, and to what else `logging` names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from moejax import json_lines
from moejax.config import Experiment
from moejax.errors import UserError
from moejax.evaluation.expert_load import load_variance
from moejax.progress import say
from moejax.training.events import Events, keep_events_until
from moejax.training.wandb_run import WandbRun


class MetricWriter:
    """Appends one JSON line per record to `metrics.jsonl` in `folder`, and sends the same numbers to TensorBoard's events there and to
    Weights & Biases, as the experiment says (`logging`).

    resume_step: of a run that goes on; later lines, and what is left of a cut one, go first, and that is reported. Raises UserError
    where something cannot be written.
    """

    def __init__(self, folder: Path, experiment: Experiment, resume_step: int | None = None):
        self._folder = folder
        path = folder / "metrics.jsonl"
        with self._writing():
            if resume_step is not None and path.exists():
                json_lines.keep_until(path, resume_step, say)
                keep_events_until(folder, resume_step)
            self._lines = path.open("a", encoding="utf-8")
            self._events = Events(folder) if "tensorboard" in experiment.logging else None
        self._wandb = WandbRun(folder, experiment) if "wandb" in experiment.logging else None

    def write(self, step: int, record: dict[str, Any]) -> None:
        """One step's numbers; lists (expert counts) go to the JSON line only."""
        numbers = {name: float(v) for name, v in record.items() if isinstance(v, int | float)}
        with self._writing():
            self._lines.write(json.dumps({"step": step, **record}, allow_nan=True) + "\n")
            self._lines.flush()
            if self._events is not None:
                self._events.write(step, numbers)
        if self._wandb is not None:
            self._wandb.write(step, numbers)

    def write_text(self, step: int, name: str, markdown: str) -> None:
        """For TensorBoard's Text tab alone."""
        if self._events is not None:
            with self._writing():
                self._events.write_text(step, name, markdown)

    def summarize(self, values: dict[str, float]) -> None:
        """What the run was as a whole, for whom shows that."""
        if self._wandb is not None:
            self._wandb.summarize(values)

    def close(self) -> None:
        with self._writing(), ExitStack() as closing:
            for log in (self._wandb, self._lines, self._events):
                if log is not None:
                    closing.callback(log.close)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._folder}: what was measured cannot be written ({error.strerror or error}): make room there, then give the "
                "same command again, with --resume where the folder still is (a run without a step leaves none)"
            ) from error


def expert_load(counts: np.ndarray, layers: Sequence[int], queries: int) -> dict[str, Any]:
    """counts: int [L, E], choices per expert; layers: the model's own numbers of theirs. Their variance as in the study's figure 11, and of
    each layer alone."""
    load = counts / max(queries, 1)
    return {"expert_counts": counts.tolist(), "expert_load_variance": load_variance(load.mean(axis=0))} | {
        f"expert_load_variance/layer_{layer}": load_variance(row) for layer, row in zip(layers, load, strict=True)
    }
