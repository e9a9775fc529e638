"""Metrics to `metrics.jsonl`, TensorBoard and the terminal."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util import tensor_util

from moejax import json_lines
from moejax.errors import UserError
from moejax.evaluation.expert_load import load_variance
from moejax.terminal import Console


class MetricWriter:
    """Appends one JSON line per record to `metrics.jsonl` and the same numbers to TensorBoard events in `folder`.

    resume_step: of a run that goes on; later lines, and what is left of a cut one, go first (`warn` is told of those). Raises UserError
    where something cannot be written.
    """

    def __init__(self, folder: Path, resume_step: int | None = None, warn: Callable[[str], None] = print):
        self._folder = folder
        path = folder / "metrics.jsonl"
        with self._writing():
            if resume_step is not None and path.exists():
                json_lines.keep_until(path, resume_step, warn)
            self._lines = path.open("a", encoding="utf-8")
            self._events = _Events(folder)

    def write(self, step: int, record: dict[str, Any]) -> None:
        """One step's numbers; lists (expert counts) go to the JSON line only."""
        with self._writing():
            self._lines.write(json.dumps({"step": step, **record}, allow_nan=True) + "\n")
            self._lines.flush()
            self._events.write(step, {name: float(v) for name, v in record.items() if isinstance(v, int | float)})

    def close(self) -> None:
        with self._writing(), closing(self._lines):
            self._events.close()

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


_NUMBERS = count()


def expert_load(counts: np.ndarray, queries: int) -> dict[str, Any]:
    """counts: int [L, E], choices per expert. Their variance as in the study's figure 11, and of each layer alone."""
    load = counts / max(queries, 1)
    return {"expert_counts": counts.tolist(), "expert_load_variance": load_variance(load.mean(axis=0))} | {
        f"expert_load_variance/layer_{layer}": load_variance(row) for layer, row in enumerate(load)
    }


class Display:
    """A progress bar with loss, speed and time left; plain lines when the output is not a terminal."""

    def __init__(self, total: int, start: int, console: Console):
        self.console, self.total, self._every = console, total, max(1, total // 20)
        self._first, self._begun = start, (start, math.nan)  # step and time from which speed is counted: the first one compiles
        columns = (
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        self._progress = Progress(*columns, console=console) if console.is_terminal else None
        if self._progress:
            self._task = self._progress.add_task("train", total=total, completed=start, text="compiling")
            self._progress.start()

    def update(self, step: int, record: dict[str, Any]) -> None:
        text = f"loss {record['loss']:.4f}  {record['queries_per_second']:.2f} queries/s  {record['tokens_per_second']:.0f} tokens/s"
        if self._progress:
            self._progress.update(self._task, completed=step, text=text)
        if step == self._first + 1:
            self._begun = (step, time.monotonic())
        if not self._progress and (step % self._every == 0 or step in (self._first + 1, self.total)):
            done, since = step - self._begun[0], time.monotonic() - self._begun[1]
            remaining = since / done * (self.total - step) if done else math.inf
            line = f"step {step}/{self.total}  {text}  lr {record['learning_rate']:.2e}  left {duration(remaining)}"
            self.console.print(line, soft_wrap=True)

    def note(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def close(self) -> None:
        if self._progress:
            self._progress.stop()


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
