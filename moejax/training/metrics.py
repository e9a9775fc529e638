"""Metrics to `metrics.jsonl`, and to what else `logging` names."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util import tensor_util

from moejax import json_lines
from moejax.config import Experiment
from moejax.errors import UserError
from moejax.evaluation.expert_load import load_variance
from moejax.files import replacing
from moejax.progress import say
from moejax.training.wandb_run import WandbRun


class MetricWriter:
    """Appends one JSON line per record to `metrics.jsonl` in `folder`, and sends the same numbers to TensorBoard's events there and to
    Weights & Biases, as the experiment says (`logging`).

    resume_step: of a run that goes on; later lines, and what is left of a cut one, go first, and that is told. Raises UserError
    where something cannot be written.
    """

    def __init__(self, folder: Path, experiment: Experiment, resume_step: int | None = None):
        self._folder = folder
        path = folder / "metrics.jsonl"
        with self._writing():
            if resume_step is not None and path.exists():
                json_lines.keep_until(path, resume_step, say)
                _keep_events_until(folder, resume_step)
            self._lines = path.open("a", encoding="utf-8")
            self._events = _Events(folder) if "tensorboard" in experiment.logging else None
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

    def summarize(self, values: dict[str, float]) -> None:
        """What the run was as a whole, for whom shows that."""
        if self._wandb is not None:
            self._wandb.summarize(values)

    def close(self) -> None:
        with ExitStack() as closing, self._writing():
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


class _Events:
    """TensorBoard's event file, by its own record writer. Written where it is called: its usual writer has a thread, which would end in
    a traceback on a full disk, and be heard of a step later."""

    def __init__(self, folder: Path):
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}"
        self._file = (folder / name).open("xb")
        self._writer = RecordWriter(self._file)
        self._write(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            event = event_pb2.Event(wall_time=time.time(), step=step)
            metadata = summary_pb2.SummaryMetadata(
                plugin_data=summary_pb2.SummaryMetadata.PluginData(plugin_name="scalars"),
                data_class=summary_pb2.DataClass.DATA_CLASS_SCALAR,
            )
            event.summary.value.add(tag=name, tensor=tensor_util.make_tensor_proto(np.float32(value)), metadata=metadata)
            self._write(event)
        self._file.flush()

    def _write(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())

    def close(self) -> None:
        self._file.close()


def _keep_events_until(folder: Path, step: int) -> None:
    """A resumed run repeats the steps after its checkpoint: their points go, and what is left of one that was cut off."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader  # not above: it looks for TensorFlow

    for path in sorted(folder.glob("events.out.tfevents.*")):
        events = list(RawEventFileLoader(str(path)).Load())
        kept = [event for event in events if event_pb2.Event.FromString(event).step <= step]
        if len(kept) < len(events):
            with replacing(path) as new, new.open("wb") as file:
                writer = RecordWriter(file)
                for event in kept:
                    writer.write(event)


_NUMBERS = count()


def expert_load(counts: np.ndarray, layers: Sequence[int], queries: int) -> dict[str, Any]:
    """counts: int [L, E], choices per expert; layers: the model's own numbers of theirs. Their variance as in the study's figure 11, and of
    each layer alone."""
    load = counts / max(queries, 1)
    return {"expert_counts": counts.tolist(), "expert_load_variance": load_variance(load.mean(axis=0))} | {
        f"expert_load_variance/layer_{layer}": load_variance(row) for layer, row in zip(layers, load, strict=True)
    }
