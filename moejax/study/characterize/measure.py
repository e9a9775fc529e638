"""One setting on the device: its step compiled, its weights, its timed and traced steps. Here jax is imported; each trial is a process."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moejax import hub
from moejax.data.batch import Batch
from moejax.data.batching import assemble, stack
from moejax.data.tokenize import Query
from moejax.profiling.breakdown import Breakdown
from moejax.profiling.capture import broken_down
from moejax.study.characterize.study import Setting
from moejax.training.program import Compiled, TrainProgram


class OutOfMemory(Exception):
    """A step that the device, or the artificial limit, has no room for. `share`: of what it takes is there."""

    def __init__(self, told: str, share: float):
        super().__init__(told)
        self.share = share


class Session:
    """A setting's step and state. limit: bytes above which a step is refused by the compiler's figure (None: the device says no).

    traced: its steps can be traced.
    """

    def __init__(self, setting: Setting, limit: int | None, *, artificial: bool = True, traced: bool = False):
        self.setting, self.limit, self.artificial = setting, limit, artificial
        self.program = TrainProgram(setting.experiment, setting.architecture, traced=traced)

    def compile(self, rows: int, row_tokens: int) -> Compiled:
        """The step for this many rows. Raises OutOfMemory where it exceeds the limit: before any weight is there."""
        compiled = self.program.compile(rows, row_tokens)
        if self.limit is not None and compiled.peak_bytes > self.limit:
            told = "RESOURCE_EXHAUSTED (artificial limit, --memory-limit)" if self.artificial else "more than the device has"
            raise OutOfMemory(
                f"{told}: {rows} rows of {row_tokens} tokens take {compiled.peak_bytes:,} bytes by the compiler, of {self.limit:,} allowed",
                self.limit / compiled.peak_bytes,
            )
        return compiled

    def compile_fitting(self, rows: int, row_tokens: int) -> tuple[int, Compiled]:
        """(rows, the step): this many rows, or a few less. For rows of another length than the largest batch was found with: as many tokens
        may take a little more memory. Raises OutOfMemory where not one row fits."""
        while True:
            try:
                return rows, self.compile(rows, row_tokens)
            except OutOfMemory as error:
                if rows == 1:
                    raise
                rows = max(1, min(rows - 1, int(rows * error.share)))

    def load(self) -> None:
        """Weights and optimizer state, as training starts with them: read from the source's folder, or random, made on the device."""
        if self.setting.random_weights:
            self.program.load_random()
        else:
            self.program.load(hub.load(str(self.setting.experiment.model.source), self.setting.experiment))

    def step(self, batch: Batch) -> float:
        """Seconds of one step on a batch [1, rows, T] that lies on the host, from sending it to having its loss."""
        seconds, metrics = self.program.timed(batch)
        if not np.isfinite(metrics["loss"]):
            raise FloatingPointError(f"loss = {metrics['loss']}")
        return seconds

    def trace(self, batches: Sequence[Batch]) -> Breakdown:
        """The breakdown of these steps, of a session that is `traced`."""
        return broken_down(len(batches), lambda number: self.step(batches[number]))


def random_rows(setting: Setting, rows: int, row_tokens: int, seed: int = 0) -> Batch:
    """A step's batch [1, rows, row_tokens]: one query of random tokens fills a row, all of it supervised."""
    tokens = np.random.default_rng([setting.experiment.seed, seed]).integers(0, setting.architecture.vocab_size, (rows, row_tokens))
    return stack([assemble([[Query.after(0, row.astype(np.int32))] for row in tokens], rows, row_tokens)], 1)
