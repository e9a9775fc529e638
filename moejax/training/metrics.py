"""Metrics to `metrics.jsonl`, TensorBoard and the terminal."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboard.summary import Writer

from moejax.files import replace_text
from moejax.terminal import Console


class MetricWriter:
    """Appends one JSON line per record to `metrics.jsonl` and the same numbers to TensorBoard events in `folder`."""

    def __init__(self, folder: Path, resume_step: int | None = None):
        path = folder / "metrics.jsonl"
        if resume_step is not None and path.exists():
            _drop_after(path, resume_step)
        self._lines = path.open("a", encoding="utf-8")
        self._events = Writer(str(folder))

    def write(self, step: int, record: dict[str, Any]) -> None:
        """One step's numbers; lists (expert counts) go to the JSON line only."""
        self._lines.write(json.dumps({"step": step, **record}, allow_nan=True) + "\n")
        self._lines.flush()
        for name, value in record.items():
            if isinstance(value, int | float):
                self._events.add_scalar(name, float(value), step)

    def close(self) -> None:
        self._lines.close()
        self._events.close()


def _drop_after(path: Path, step: int) -> None:
    """A resumed run repeats the steps after its checkpoint: their old lines go. Replaced whole."""
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if line and json.loads(line)["step"] <= step]
    replace_text(path, "".join(f"{line}\n" for line in kept))


def expert_load(counts: np.ndarray, queries: int) -> dict[str, Any]:
    """counts: int [L, E], choices per expert. Their variance as in the study's figure 11, and of each layer alone."""
    load = counts / max(queries, 1)
    return {"expert_counts": counts.tolist(), "expert_load_variance": load_variance(load.mean(axis=0))} | {
        f"expert_load_variance/layer_{layer}": load_variance(row) for layer, row in enumerate(load)
    }


def load_variance(load: np.ndarray) -> float:
    """Sample variance (the sum over E - 1) of tokens per query over the experts, load [E].

    The study's figure 11 shows tokens per query, mean over queries and layers, of the experts 0 to 7, and prints this variance for
    BlackMamba and for one of Mixtral's four data sets and models; beside the other three stands the population variance (over E).
    """
    return float(load.var(ddof=1)) if load.size > 1 else 0.0


def memory_bytes() -> dict[str, int]:
    """Peak memory of the device; on a CPU, whose allocator does not say, the peak resident memory of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return {"device_peak_bytes": stats["peak_bytes_in_use"], "device_bytes": stats["bytes_in_use"]}
    return {"host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)}


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
