"""The run's step, compiled from shapes alone: what does not fit is said before weights are downloaded. The run uses that very program."""

from __future__ import annotations

import time
from typing import Any

from moejax import device
from moejax.config import Experiment
from moejax.data.pipeline import Dataset
from moejax.estimator.units import counted
from moejax.models.config import Architecture
from moejax.profiling.capture import compile_profiled
from moejax.progress import waiting
from moejax.terminal import Console
from moejax.training import aot, memory
from moejax.training.run_steps import steps_in, total_steps

Shape = tuple[int, int, int]  # micro-batches, rows, tokens of a row


class Programs:
    """Compiled steps by the shape of their batch. seconds: spent compiling; peak_bytes: the largest, by the compiler."""

    def __init__(self, experiment: Experiment, config: Architecture, steps: int, console: Console):
        # The steps of the whole run stand in the program: in its schedule.
        training = experiment.training.model_copy(update={"steps": steps})
        self._experiment, self._config, self._console = experiment.model_copy(update={"training": training}), config, console
        self._compiled: dict[Shape, Any] = {}
        self.seconds, self.peak_bytes = 0.0, 0

    def get(self, shape: Shape) -> Any:
        """The program for a shape. Raises UserError, with the batch that would fit, where it takes more memory than there is."""
        if shape not in self._compiled:
            start = time.perf_counter()
            with waiting(self._console, f"compiling the step for {counted(shape[1], 'row')} of {shape[2]} tokens"):
                program = self._compile(shape, shape[1])
                peak = memory.check(program, shape[1], lambda rows: self._compile(shape, rows), device.usable_bytes())
            self._compiled[shape] = program
            self.peak_bytes = max(self.peak_bytes, peak)
            self.seconds += time.perf_counter() - start
        return self._compiled[shape]

    def _compile(self, shape: Shape, rows: int) -> Any:
        compiler = {"compiler": compile_profiled} if self._experiment.profile else {}
        return aot.compile_step(self._experiment, self._config, rows=rows, row_tokens=shape[2], gpu=None, **compiler).program


def largest_shape(experiment: Experiment, dataset: Dataset) -> Shape:
    """Of the batches that the run will train on."""
    accumulation = experiment.training.gradient_accumulation
    steps = min(total_steps(experiment, dataset), steps_in(experiment, dataset, 0))  # the longest row comes in every epoch
    tokens = dataset.train.row_tokens(0)[: steps * accumulation]
    return accumulation, experiment.data.batch_rows, max(tokens)
