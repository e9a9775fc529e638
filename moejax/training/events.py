"""TensorBoard's event files of a run: numbers under grouped tags, texts, and what a resumed run leaves of them."""

from __future__ import annotations

import os
import socket
import time
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util import tensor_util

from moejax.files import replacing


def tag(name: str) -> str:
    """Where a metric of metrics.jsonl stands in TensorBoard: `group/name`.

    TensorBoard sorts groups by name, so these are named such that the loss comes first: loss, memory, rewards (of DPO), router,
    score, speed, training.
    """
    if name in _LOSSES:
        return _LOSSES[name]
    if name.startswith("eval/"):  # the problems of the config's section `eval`
        return "score/" + name.removeprefix("eval/")
    if name.startswith("eval_"):  # the held-out part of the data
        return tag(name.removeprefix("eval_")) + "_evaluation"
    if name.endswith("_bytes"):
        return "memory/" + name
    if name.startswith("expert_load_variance") or name == "aux_loss":
        return "router/" + name
    if name.endswith("_per_second") or name in ("step_seconds", "model_flop_utilization"):
        return "speed/" + name
    return name if name.startswith("rewards/") else "training/" + name.replace("/", "_")


_LOSSES = {"loss": "loss/train", "eval_loss": "loss/evaluation"}


class Events:
    """One event file, by TensorBoard's own record writer. Written where it is called: its usual writer has a thread, which would end in a
    traceback on a full disk, and report it a step later."""

    def __init__(self, folder: Path):
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}"
        self._file = (folder / name).open("xb")
        self._writer = RecordWriter(self._file)
        self._write(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._add(step, tag(name), np.float32(value), "scalars", summary_pb2.DataClass.DATA_CLASS_SCALAR)
        self._file.flush()

    def write_text(self, step: int, name: str, markdown: str) -> None:
        """For TensorBoard's Text tab."""
        self._add(step, name, markdown.encode(), "text", summary_pb2.DataClass.DATA_CLASS_TENSOR)
        self._file.flush()

    def _add(self, step: int, name: str, value: Any, plugin: str, kind: Any) -> None:
        plugin_data = summary_pb2.SummaryMetadata.PluginData(plugin_name=plugin)
        event = event_pb2.Event(wall_time=time.time(), step=step)
        event.summary.value.add(
            tag=name, tensor=tensor_util.make_tensor_proto(value),
            metadata=summary_pb2.SummaryMetadata(plugin_data=plugin_data, data_class=kind),
        )  # fmt: skip
        self._write(event)

    def _write(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())

    def close(self) -> None:
        self._file.close()


_NUMBERS = count()


def keep_events_until(folder: Path, step: int) -> None:
    """Remove the points after `step`, which a resumed run repeats, and what is left of one that was cut off."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader  # not above: it looks for TensorFlow

    for path in sorted(folder.glob("events.out.tfevents.*")):
        events = list(RawEventFileLoader(str(path)).Load())
        kept = [event for event in events if event_pb2.Event.FromString(event).step <= step]
        if len(kept) < len(events):
            with replacing(path) as new, new.open("wb") as file:
                writer = RecordWriter(file)
                for event in kept:
                    writer.write(event)
