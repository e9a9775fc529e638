"""One setting on the device: its step compiled, its weights, its timed and traced steps. Here jax is imported; each trial is a process."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax import hub
from moejax.data.batch import Batch
from moejax.data.batching import assemble, stack
from moejax.data.tokenize import Query
from moejax.hub.model import model_arguments
from moejax.models.build import Model, build, random_weights
from moejax.profiling import xplane
from moejax.profiling.breakdown import Breakdown, analyze
from moejax.profiling.capture import Capture, compile_profiled
from moejax.study.characterize.study import Setting
from moejax.training import aot
from moejax.training.optimizer import make_optimizer, make_schedule
from moejax.training.state import initial_state, split


class OutOfMemory(Exception):
    """A step that the device, or the artificial limit, has no room for. `share`: of what it takes is there."""

    def __init__(self, told: str, share: float):
        super().__init__(told)
        self.share = share


class Session:
    """A setting's step and state. limit: bytes above which a step is refused by the compiler's figure (None: the device says no)."""

    def __init__(self, setting: Setting, limit: int | None, *, artificial: bool = True):
        self.setting, self.limit, self.artificial = setting, limit, artificial
        self.experiment, self.architecture = setting.experiment, setting.architecture
        self._compiled: dict[tuple[int, int, bool], aot.Compiled] = {}
        self._state: Any = None
        self._frozen: Any = None
        self._graphdef: Any = None

    def compile(self, rows: int, row_tokens: int, *, traced: bool = False) -> aot.Compiled:
        """The step for so many rows. Raises OutOfMemory where it exceeds the limit: before any weight is there."""
        key = rows, row_tokens, traced
        if key not in self._compiled:
            compiler = {"compiler": compile_profiled} if traced else {}
            self._compiled[key] = aot.compile_step(
                self.experiment, self.architecture, rows=rows, row_tokens=row_tokens, gpu=None, **compiler  # type: ignore[arg-type]
            )
        compiled = self._compiled[key]
        if self.limit is not None and compiled.peak_bytes > self.limit:
            told = "RESOURCE_EXHAUSTED (artificial limit, --memory-limit)" if self.artificial else "more than the device has"
            raise OutOfMemory(
                f"{told}: {rows} rows of {row_tokens} tokens take {compiled.peak_bytes:,} bytes by the compiler, of {self.limit:,} allowed",
                self.limit / compiled.peak_bytes,
            )
        return compiled

    def compile_fitting(self, rows: int, row_tokens: int, *, traced: bool = False) -> tuple[int, aot.Compiled]:
        """(rows, the step): so many rows, or a few less. For rows of another length than the largest batch was found with: as many tokens
        may take a little more memory. Raises OutOfMemory where not one row fits."""
        while True:
            try:
                return rows, self.compile(rows, row_tokens, traced=traced)
            except OutOfMemory as error:
                if rows == 1:
                    raise
                rows = max(1, min(rows - 1, int(rows * error.share)))

    def load(self) -> None:
        """Weights and optimizer state, as training starts with them."""
        model = self._model()
        self._graphdef, trainable, self._frozen = split(model, full=self.experiment.adapter is None)
        training = self.experiment.training
        self._state = initial_state(trainable, make_optimizer(training, make_schedule(training, 1000)))

    def _model(self) -> Model:
        """Read from the source's folder; or random, made on the device, with adapters that change nothing yet."""
        s = self.setting
        if not s.random_weights:
            source = self.experiment.model.source
            assert source is not None
            return hub.load(source, self.experiment)
        model = random_weights(build(self.architecture, **model_arguments(self.experiment)), jax.random.key(self.experiment.seed))
        for _, node in nnx.iter_modules(model.layers):
            lora: Any = node
            if hasattr(node, "a") and hasattr(node, "b"):
                lora.b.set_value(jnp.zeros_like(lora.b.get_value()))
        return model

    def model(self) -> Model:
        """The model as it stands."""
        return nnx.merge(self._graphdef, self._state.trainable, self._frozen)

    def step(self, program: Any, batch: Batch) -> float:
        """Seconds of one step on a batch [1, rows, T] that lies on the host, from sending it to having its loss."""
        start = time.perf_counter()
        self._state, metrics = program(self._state, self._frozen, jax.device_put(batch))
        loss = float(metrics["loss"])
        seconds = time.perf_counter() - start
        if not np.isfinite(loss):
            raise FloatingPointError(f"loss = {loss}")
        return seconds

    def trace(self, program: Any, batches: Iterable[Batch]) -> Breakdown:
        """The breakdown of these steps, whose program was compiled with `traced`."""
        batches = list(batches)
        with tempfile.TemporaryDirectory() as folder:
            capture = Capture(Path(folder), 1, len(batches), after=-1)
            for number, batch in enumerate(batches, 1):
                with capture.step(number):
                    self.step(program, batch)
            capture.close()
            return analyze(xplane.read(xplane.find(Path(folder))))


def random_rows(setting: Setting, rows: int, row_tokens: int, seed: int = 0) -> Batch:
    """A step's batch [1, rows, row_tokens]: one query of random tokens fills a row, all of it supervised."""
    tokens = np.random.default_rng([setting.experiment.seed, seed]).integers(0, setting.architecture.vocab_size, (rows, row_tokens))
    return stack([assemble([[Query(row.astype(np.int32), 0)] for row in tokens], rows, row_tokens)], 1)
