"""A whole run as the estimates see it: how many steps of how many tokens, and what it does besides. No jax."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moejax.estimator import own, sizes
from moejax.estimator.lengths import Lengths
from moejax.models.config import Architecture

if TYPE_CHECKING:
    from moejax.config import Experiment

PACKED = 0.98
"""Of packed rows' tokens those that are real, where the data were not packed."""
DISK, LINE = 1.5e9, 125e6
"""Bytes/s: of a rented machine's disk, and of its line to the Hub (1 Gbit/s). Assumed."""
COMPILE_SECONDS = 90.0
BESIDES = 0.5, 3.0
"""Between which times what a run does besides its steps is taken to lie: none of it was measured."""
CHECKPOINT = 3
"""An adapter's bytes and its two moments'."""


@dataclass(frozen=True)
class Workload:
    """A run. queries: of an epoch; row_tokens: of a row as this program computes it, the mean, longest_row: the longest; steps,
    other_steps: optimizer steps of this program, and of one that pads instead of packing; evaluated_rows: of one evaluation. fetched:
    whether the weights are downloaded first."""

    experiment: Experiment
    config: Architecture
    lengths: Lengths
    queries: int
    epochs: float
    row_tokens: float
    longest_row: int
    steps: int
    other_steps: int
    evaluated_rows: int = 0
    fetched: bool = True

    @property
    def rows(self) -> int:
        return self.experiment.data.batch_rows

    @property
    def accumulation(self) -> int:
        return self.experiment.training.gradient_accumulation

    @property
    def mean_tokens(self) -> float:
        return self.lengths.batch_tokens(1, "pack", row_tokens=self.experiment.data.max_length)

    @property
    def padded_tokens(self) -> float:
        """Of a row that is as long as the longest of its micro-batch."""
        rows = min(self.rows, self.lengths.queries)
        return self.lengths.expected_longest(rows, row_tokens=self.experiment.data.max_length)

    @property
    def evaluations(self) -> int:
        every = self.experiment.training.eval_every
        return 0 if every is None or not self.evaluated_rows else self.steps // every

    @property
    def checkpoints(self) -> int:
        every = self.experiment.checkpoint.every
        return 1 + (0 if every is None else self.steps // every)

    def besides_seconds(self, micro_seconds: float) -> float:
        """Of loading, compiling, evaluations and checkpoints; micro_seconds: of a micro-batch."""
        stored = sizes.stored(self.experiment, self.config)
        trained = sum(w.bytes for w in stored if w.trained)
        evaluating = self.evaluations * math.ceil(self.evaluated_rows / self.rows) * micro_seconds * own.FORWARD
        return self.download_bytes / DISK + COMPILE_SECONDS + evaluating + self.checkpoints * CHECKPOINT * trained / DISK

    @property
    def download_bytes(self) -> float:
        """Of the model in bf16, or of experts that its files have in 4 bits."""
        total, _ = self.config.parameters
        if self.config.expert_format is None:
            return 2.0 * total
        experts = sum(b * (m.copies or 1) * m.out * m.inner for m, b in self.config.linears.values() if m.copies)
        return 2.0 * (total - experts) + 0.53125 * experts


def of(
    experiment: Experiment, config: Architecture, found: Lengths, *, queries: int | None = None, rows_an_epoch: int | None = None,
    evaluated_rows: int = 0, fetched: bool = True,
) -> Workload:  # fmt: skip
    """Of queries of these lengths. queries: how many, where the lengths are a part's; rows_an_epoch: where the data were read."""
    from moejax.config_data import ROW_MULTIPLE

    d, t = experiment.data, experiment.training
    many = queries or found.queries
    rows = min(d.batch_rows, found.queries)
    if d.batching in ("pack", "fixed"):
        row_tokens = float(d.longest_row)
    else:
        row_tokens = found.batch_tokens(rows, d.batching, row_tokens=d.max_length, multiple=ROW_MULTIPLE) / rows
    longest = d.longest_row if d.batching in ("pack", "fixed") else min(d.longest_row, ROW_MULTIPLE * -(-found.longest // ROW_MULTIPLE))
    if rows_an_epoch is None:
        mean = found.batch_tokens(1, "pack", row_tokens=d.max_length)
        rows_an_epoch = math.ceil(many * mean / (d.longest_row * PACKED)) if d.batching == "pack" else many
    of_step = d.batch_rows * t.gradient_accumulation
    epochs = t.epochs or 1

    def steps(rows_in_epoch: int) -> int:
        return t.steps or epochs * math.ceil(rows_in_epoch / of_step)

    counts = steps(rows_an_epoch), steps(many), evaluated_rows
    return Workload(experiment, config, found, many, epochs, row_tokens, longest, *counts, fetched)
