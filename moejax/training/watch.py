"""What is wrong with a step's numbers: found when they arrive, before anything of the step is saved."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import numpy as np

from moejax.config import Experiment
from moejax.data.batch import Batch, PairBatch
from moejax.errors import UserError
from moejax.files import replacing
from moejax.progress import say

BAD_IN_A_ROW = 10
"""This many skipped steps one after the other end a run: the next will be no better."""
MOST_BATCHES = 100
"""Of spikes and skipped steps; that of a step which ends the run is always written."""
_SPIKE = 6.0  # standard deviations of the losses before
_STILL = 1e-4  # of the weights' norm, moved in a whole run. 20 steps of full fine-tuning at 5e-7, half of them warm-up, move twice that
_NUMBERS = ("loss", "grad_norm", "update_norm", "param_norm")


class Watch:
    """Looks at each step's record, in order. Batches of bad steps and of loss spikes are written to `bad_steps/step-N.npz` in the folder
    `own` (of a process that is not the first: of its own). run: the run's."""

    def __init__(self, run: Path, own: Path, experiment: Experiment):
        self._run, self._folder, self._skip = run, own / "bad_steps", experiment.training.on_bad_step == "skip"
        self._recent: deque[float] = deque(maxlen=100)
        self._first: list[float] = []
        self._from = self._steps = 0
        self._moved, self._norm = 0.0, 0.0
        self.skipped, self._in_a_row, self._written = 0, 0, 0

    def look(self, step: int, record: Mapping[str, Any], batch: Batch | PairBatch, last_saved: int | None) -> None:
        """Raises UserError for numbers that are not finite, where the run is to stop at them or has skipped BAD_IN_A_ROW."""
        bad = [f"{name} = {record[name]}" for name in _NUMBERS if not math.isfinite(record[name])]
        if not bad:
            self._in_a_row = 0
            self._from, self._steps = self._from or step, self._steps + 1
            self._moved, self._norm = self._moved + record["update_norm"], record["param_norm"]
            self._spike(step, record["loss"], batch)
            return
        what = f"step {step}: {', '.join(bad)}: not finite"
        at = self._write(step, batch, last=not record.get("skipped"))
        if record.get("skipped"):
            self.skipped, self._in_a_row = self.skipped + 1, self._in_a_row + 1
            if self._in_a_row < BAD_IN_A_ROW:
                say(f"warning: {what}. The step changed nothing (training.on_bad_step; {self.skipped} skipped so far){at}")
                return
            what += f", the last of {BAD_IN_A_ROW} one after the other"
        saved = "no checkpoint was saved yet" if last_saved is None else f"the last good checkpoint is step {last_saved}"
        raise UserError(
            f"{what}. The run stops; {saved} in {self._run}/checkpoints{at}. Try a lower training.learning_rate, or "
            "compute_dtype=float32" + ("" if self._skip else "; training.on_bad_step=skip leaves such steps out") + "."
        )

    def _spike(self, step: int, loss: float, batch: Batch | PairBatch) -> None:
        if len(self._recent) >= 20:
            usual, spread = fmean(self._recent), pstdev(self._recent)
            if loss > 1.5 * usual and loss > usual + _SPIKE * spread:
                say(f"warning: step {step}: loss {loss:.4f}, {usual:.4f} on average before: a spike{self._write(step, batch)}")
        if len(self._first) < 10:
            self._first.append(loss)
        self._recent.append(loss)

    def _write(self, step: int, batch: Batch | PairBatch, last: bool = False) -> str:
        """Where the batch was written, as the end of a message; nothing where it cannot be, or where many were."""
        if self._written == MOST_BATCHES and not last:
            return ""
        self._written += 1
        path = self._folder / f"step-{step}.npz"
        try:
            self._folder.mkdir(exist_ok=True)
            with replacing(path) as new, new.open("wb") as file:
                arrays: dict[str, Any] = {name: np.asarray(value) for name, value in batch._asdict().items()}
                np.savez_compressed(file, **arrays)
        except OSError as error:
            return f" (its batch cannot be written: {error.strerror or error})"
        return f"; its batch: {path}"

    def conclude(self) -> list[str]:
        """Lines for the end of a run: steps that were skipped, a rate that did nothing, and a loss that went up."""
        lines = [f"{self.skipped} steps were skipped: their numbers were not finite"] if self.skipped else []
        # Not of a resumed run's last steps, whose rate may have decayed. No farther than the sum of the updates, whatever their directions.
        if self._from == 1 and self._steps >= 20 and self._moved < _STILL * self._norm:
            lines.append(
                f"the learning rate did next to nothing: {self._steps} steps moved the trained weights by {self._moved / self._norm:.2g} "
                "of their norm at most. Try ten times the rate"
            )
        if len(self._first) == 10 and len(self._recent) >= 20:
            before, after = fmean(self._first), fmean(list(self._recent)[-10:])
            if after > 1.05 * before:
                lines.append(
                    f"the loss went up: {before:.4f} in the first ten steps, {after:.4f} in the last ten. The learning rate may be too "
                    "high: try a tenth of it"
                )
        return lines
