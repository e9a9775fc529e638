"""The study's Table III next to ours: `estimate.py memory --study`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from moejax import config, installation
from moejax.commands.estimate_memory import quiet_compiler
from moejax.commands.tables import print_json, show_table
from moejax.config import DeviceConfig
from moejax.errors import UserError
from moejax.estimator import lengths, memory, sizes
from moejax.gpus import GPUS
from moejax.study import reference
from moejax.study.cost.curves import FIGURE_15_DATASET, GPU_NAMES
from moejax.study.cost.reproduce import section
from moejax.training import oracle


@dataclass(frozen=True)
class Cell:
    """One cell of the study's Table III, for any card: its largest batch in queries (None: not run), and how long a padded row gets."""

    gpu: str
    model: str
    kind: str
    dataset: str
    row_tokens: int
    study: int | None

    @property
    def config(self) -> str:
        """The name of the study's config."""
        model = {"mixtral": "mixtral_8x7b", "blackmamba": "blackmamba_2.8b"}[self.model]
        return f"{model}_{'cs' if self.dataset == 'commonsense_15k' else 'math'}_{self.kind}"


STUDY_GPUS = ("A100-40", "A40", "A100-80")  # 40, 48 and 80 GB


def study_cells() -> tuple[Cell, ...]:
    """Mixtral on 40, 48 and 80 GB and BlackMamba on 48, where the study ran it; sparse and dense, both data sets. The study's figure is the
    largest that it prints or shows: Table III on the A40, the ends of Figure 15's curves (MATH, `curves.py` says why) and Figure 13's
    measured points (commonsense, sparse).

    Rows are as long as the longest query (commonsense 512) or the study's cut (MATH 1024): what the worst of its padded batches takes.
    """
    known: dict[tuple[str, str, str, str], int] = {}

    def at_least(gpu: str, model: str, kind: str, dataset: str, batch: int) -> None:
        key = gpu, model, kind, dataset
        known[key] = max(batch, known.get(key, 0))

    for b in reference.max_batches():
        at_least("A40", b.model, b.kind, b.dataset, max(b.printed, b.swept))
    for c in reference.curves():
        for kind, batch, _ in c.points:
            at_least(GPU_NAMES[c.gpu], c.model, kind, c.dataset or FIGURE_15_DATASET, batch)
    for gb, batch in reference.max_batch_figure().ground_truth.items():
        name = next(n for n in STUDY_GPUS if GPUS[n].memory_gb == gb)
        at_least(name, "mixtral", "sparse", "commonsense_15k", batch)
    cells = []
    for gpu in STUDY_GPUS:
        for model in ("mixtral", "blackmamba") if gpu == "A40" else ("mixtral",):
            for kind in ("sparse", "dense"):
                for dataset in ("commonsense_15k", "math_14k"):
                    longest = min(lengths.of_study(dataset).longest, lengths.STUDY_CUTOFF)
                    cells.append(Cell(gpu, model, kind, dataset, longest, known.get((gpu, model, kind, dataset))))
    return tuple(cells)


def run(options: argparse.Namespace) -> int:
    """Table III on 40, 48 and 80 GB: the study's largest batch, and ours for queries padded to the longest row, proved by b and b + 1.
    Exit code 1 where ours is smaller than the study's."""
    if options.config or options.file or options.overrides or options.rows is not None or options.seq_len is not None:
        raise UserError("--study runs the study's own configs, rows and GPUs: leave out CONFIG, --rows, --seq-len and key.sub=value")
    quiet_compiler(options.gpu)
    fraction = DeviceConfig().memory_fraction
    rows, reasons = [], []
    ratios: dict[tuple[str, str, str], float] = {}  # compiler over closed form, of the same program with other rows: a better guess
    for cell in study_cells():
        same = cell.gpu, cell.model, cell.kind
        peaks = _oracle(cell, options.closed_form)
        found = peaks.largest(memory.usable_bytes(GPUS[cell.gpu], fraction), ratios.get(same, 1.0))
        reasons += [peaks.reason] * (peaks.reason is not None)
        by = "closed form" if peaks.reason is not None else "compiler"
        closed_gb = peaks.breakdown(found.rows or 1).total / 1e9
        ratios[same] = (found.peak or found.next_peak) / 1e9 / closed_gb
        held = None if cell.study is None else "yes" if found.rows >= cell.study else "NO"
        rows.append(
            (cell.gpu, cell.model, cell.kind, cell.dataset, cell.row_tokens, cell.study, found.rows, held,
             None if found.peak is None else found.peak / 1e9, found.next_peak / 1e9, closed_gb, by, len(found.tried))
        )  # fmt: skip
    table = section("largest_batches", rows, fraction=fraction)
    if options.json:
        about = {"what": "Table III beside ours", "memory_fraction": fraction, "versions": installation.versions()}
        print_json(about | {"cells": table.records()})
    else:
        why = [f"by the closed form, not by the compiler: {reason}" for reason in dict.fromkeys(reasons)]
        show_table(table.title, table.columns, table.rows, [*table.notes, *why])
    return 0 if all(row[7] != "NO" for row in rows) else 1


def _oracle(cell: Cell, closed: bool) -> oracle.Oracle:
    experiment = config.load(installation.CONFIGS / f"{cell.config}.yaml")
    return oracle.oracle(experiment, sizes.architecture_of(experiment), GPUS[cell.gpu], cell.row_tokens, closed)
