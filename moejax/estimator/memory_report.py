"""What `estimate.py memory` prints: the largest batch, the peak and what it is made of; and the study's Table III beside ours.

Who knows a peak is handed in: a compiler's figures, or the closed form's. Nothing is compiled here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from moejax.errors import UserError
from moejax.estimator import memory
from moejax.estimator.commands import print_json, show_table
from moejax.estimator.gpus import GPU, GPUS
from moejax.estimator.units import Gigabytes, gigabytes

if TYPE_CHECKING:
    from moejax.config import Experiment
    from moejax.estimator.closed_form import Breakdown

MACHINE = "here"  # chip of this machine's own device: its memory is already jax's share


class Peaks(Protocol):
    """One experiment's step on one GPU, by rows. `reason`: why it is not the compiler that answers; None where it does."""

    reason: str | None
    row_tokens: int
    hits: int
    misses: int

    def breakdown(self, rows: int) -> Breakdown: ...

    def peak_bytes(self, rows: int) -> int: ...

    def largest(self, limit: float, ratio: float = 1.0) -> memory.Largest: ...


def queries_per_row(experiment: Experiment, row_tokens: int, padded: bool) -> float | None:
    """1 in a padded row; in a packed one the row over the mean query of the study's data set, where the config names it. Else None."""
    from moejax.estimator import lengths

    if padded:
        return 1.0
    for dataset in ("commonsense_15k", "math_14k"):
        if dataset in (experiment.data.source or ""):
            return row_tokens / lengths.of_study(dataset).mean
    return None


def table(
    experiment: Experiment, asked: Sequence[tuple[GPU, Peaks]], *, rows: int | None, padded: bool, as_json: bool
) -> int:
    """Print one line a GPU, and the breakdown at the largest batch (or at `rows`). UserError where not one row fits on any GPU."""
    lines = [_line(experiment, gpu, peaks, rows, padded) for gpu, peaks in asked]
    refused = [str(line["problem"]) for line in lines if line["problem"]]
    if len(refused) == len(lines):
        raise UserError("; ".join(refused))
    if as_json:
        print_json({"config": experiment.name, "row_tokens": asked[0][1].row_tokens, "gpus": lines})
        return 0
    per_row = queries_per_row(experiment, asked[0][1].row_tokens, padded)
    fitting = "rows" if rows is not None else "largest batch, rows"
    columns = ("GPU", "usable GB", fitting, "queries", "peak GB", "with one row more", "free GB", "by")
    cells = [
        (line["gpu"], line["usable_gb"], line["rows"], line["queries"], line["peak_gb"], line["next_peak_gb"], line["free_gb"], line["by"])
        for line in lines
    ]
    notes = [*refused, _what_rows_are(asked[0][1].row_tokens, padded, per_row)]
    notes += sorted({f"{line['gpu']}: by the closed form, not by the compiler: {line['reason']}" for line in lines if line["reason"]})
    show_table(f"{experiment.name}: rows of {asked[0][1].row_tokens} tokens, {_share(experiment)}", columns, cells, notes)
    shown = [line for line in lines if line["parts_gb"]]
    names = list(dict.fromkeys(name for line in shown for name in line["parts_gb"]))
    parts = [(name, *(Gigabytes(line["parts_gb"].get(name, 0.0)) for line in shown)) for name in names]
    parts.append(("peak", *(line["peak_gb"] for line in shown)))
    moments = sorted({f"temporaries: {line['moment']}" for line in shown})
    rest = "rest: what the closed form does not account for of the compiler's peak; negative where it is too high"
    notes = [*moments, *([rest] if any(line["reason"] is None for line in shown) else [])]
    show_table("what the peak is made of, GB", ("part", *(f"{line['gpu']}, {line['rows']} rows" for line in shown)), parts, notes)
    return 0


def _share(experiment: Experiment) -> str:
    return f"at most {experiment.device.memory_fraction:.0%} of a GPU's memory (device.memory_fraction)"


def _what_rows_are(row_tokens: int, padded: bool, per_row: float | None) -> str:
    if padded:
        return f"a row is one query, padded to {row_tokens} tokens"
    if per_row is None:
        return "rows are packed: how many queries they hold depends on the data"
    return f"rows are packed: {per_row:.1f} queries each at the data set's mean length (GPT-NeoX tokens, the study's Figure 2)"


def _line(experiment: Experiment, gpu: GPU, peaks: Peaks, rows: int | None, padded: bool) -> dict[str, Any]:
    fraction = 1.0 if gpu.chip == MACHINE else experiment.device.memory_fraction
    limit = memory.usable_bytes(gpu, fraction)
    problem = None
    if rows is None:
        found = peaks.largest(limit)
        chosen, peak, after = found.rows, found.peak, found.next_peak
        if chosen == 0:
            problem = memory.too_large(f"{experiment.name} with one row of {peaks.row_tokens} tokens", after, gpu, fraction, GPUS)
    else:
        chosen, peak, after = rows, peaks.peak_bytes(rows), None
        if peak > limit:
            problem = memory.too_large(f"{experiment.name} with {rows} rows of {peaks.row_tokens} tokens", peak, gpu, fraction, GPUS)
    if not gpu.bf16 and experiment.training.asks_bf16:
        problem = (
            f"{gpu.name} has no bf16, which the training section asks for: a run is refused there. training.compute_dtype=float32 "
            "training.param_dtype=float32 would run, or a GPU of compute capability 8.0 (A100, A40, RTX 30) or newer"
        )
    shown = chosen or 1
    peak = peak if peak is not None else peaks.peak_bytes(shown)
    made = peaks.breakdown(shown)
    per_row = queries_per_row(experiment, peaks.row_tokens, padded)
    parts = made.parts(None if peaks.reason is not None else peak)
    by = "closed form" if peaks.reason is not None else f"compiler ({peaks.misses} compiled, {peaks.hits} kept)"
    return {
        "gpu": gpu.name, "usable_gb": gigabytes(limit), "rows": chosen, "queries": None if per_row is None else int(chosen * per_row),
        "peak_gb": gigabytes(peak), "next_peak_gb": None if after is None or chosen == 0 else gigabytes(after),
        "free_gb": gigabytes(limit - peak),
        "by": by, "reason": peaks.reason, "problem": problem, "moment": made.moment, "closed_form_gb": made.total / 1e9,
        "parts_gb": {name: size / 1e9 for name, size in parts.items()},
    }  # fmt: skip


def study(ask: Callable[[str, str, str, str, int, bool], Peaks], closed: bool, as_json: bool, versions: dict[str, str]) -> int:
    """Table III on 40, 48 and 80 GB: the study's largest batch, and ours for queries padded to the longest row, proved by b and b + 1.
    `versions`: of what compiles, for the JSON. Exit code 1 where ours is smaller than the study's."""
    from moejax.config import DeviceConfig

    fraction = DeviceConfig().memory_fraction
    rows = []
    ratios: dict[tuple[str, str, str], float] = {}  # compiler over closed form, of the same program with other rows: a better guess
    for cell in memory.study_cells():
        same = cell.gpu, cell.model, cell.kind
        peaks = ask(cell.model, cell.dataset, cell.kind, cell.gpu, cell.row_tokens, closed)
        found = peaks.largest(memory.usable_bytes(GPUS[cell.gpu], fraction), ratios.get(same, 1.0))
        by = "closed form" if peaks.reason is not None else "compiler"
        closed_gb = peaks.breakdown(found.rows or 1).total / 1e9
        ratios[same] = (found.peak or found.next_peak) / 1e9 / closed_gb
        held = None if cell.study is None else "yes" if found.rows >= cell.study else "NO"
        rows.append(
            (cell.gpu, cell.model, cell.kind, cell.dataset, cell.row_tokens, cell.study, found.rows, held,
             None if found.peak is None else found.peak / 1e9, found.next_peak / 1e9, closed_gb, by, len(found.tried))
        )  # fmt: skip
    columns = ("GPU", "model", "kind", "data set", "row", "study", "ours", "at least",
               "peak GB", "one more", "closed form GB", "by", "asked")  # fmt: skip
    if as_json:
        cells = [dict(zip(columns, row, strict=True)) for row in rows]
        print_json({"what": "Table III beside ours", "memory_fraction": fraction, "versions": versions, "cells": cells})
    else:
        notes = [
            "queries padded to the longest row (commonsense 512 tokens, MATH cut at 1024), one a row: the study's padding at its worst",
            "study: Table III (A40), the ends of Figure 15's curves (MATH), Figure 13's measured points (commonsense, sparse); - not run",
            f"ours fits in {fraction:.0%} of the memory; peak: with so many queries, and with one more; asked: batch sizes looked at",
        ]
        show_table("Table III beside ours: largest batch, queries", columns, rows, notes)
    return 0 if all(row[7] != "NO" for row in rows) else 1
