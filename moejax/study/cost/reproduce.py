"""The study's Tables III and IV and Figures 13, 14 and 15 recomputed from its published data, next to what it prints; then our model.

Titles, columns and notes are in `reproduce.toml`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

from moejax.estimator.equations import fit_equation2, max_batch, max_batch_raw
from moejax.estimator.lengths import STUDY_CUTOFF, of_study
from moejax.study import reference
from moejax.study.cost import curves, paper

RATIO_BAR, RATIO_FOUR_BAR, LARGER_HALF_BAR = 0.5, 0.25, 0.075


@dataclass(frozen=True)
class Section:
    """A table: `rows` in the order of `columns`; `notes` say in a line each where printed and recomputed disagree, and why."""

    key: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    notes: tuple[str, ...] = ()

    def records(self) -> list[dict[str, Any]]:
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


_TEXT = tomllib.loads(resources.files(__package__).joinpath("reproduce.toml").read_text("utf-8"))


def section(key: str, rows: Sequence[tuple[Any, ...]], **numbers: float) -> Section:
    """With its title, columns and notes; numbers: those that the notes name."""
    text = _TEXT[key]
    return Section(key, text["title"], tuple(text["columns"]), tuple(rows), tuple(note.format(**numbers) for note in text["notes"]))


def sections() -> tuple[Section, ...]:
    """Everything, in the order it is printed."""
    return table_3(), figure_13(), figures_14_15(), table_4(), our_model(), transfers()


def table_3() -> Section:
    """The largest batch on the A40 by equation 1, the longest query's tokens in it."""
    figure = reference.max_batch_figure()
    rows = []
    for cell in reference.max_batches():
        tokens = min(of_study(cell.dataset).longest, STUDY_CUTOFF)
        sparsity = reference.EXPERTS_PER_TOKEN[cell.kind] / reference.EXPERTS
        batch = {
            name: max_batch(48, figure.model_gb[cell.model], tokens, sparsity, *pairs[cell.model])
            for name, pairs in (("printed", figure.printed), ("artifact", figure.artifact))
            if cell.model in pairs
        }
        best = batch.get("artifact", batch["printed"])
        rows.append(
            (cell.model, cell.dataset, cell.kind, cell.printed, cell.swept, batch["printed"], batch.get("artifact"), best - cell.printed)
        )
    return section("table_3", rows)


def figure_13() -> Section:
    """Mixtral's largest batch over memory, raw and with both pairs of coefficients."""
    figure = reference.max_batch_figure()
    printed: dict[int, tuple[int, str]] = {gb: (batch, "measured") for gb, batch in figure.ground_truth.items()}
    printed |= {gb: (batch, "projected") for gb, batch in figure.printed_projection.items()}
    rows = []
    for gb, (batch, what) in sorted(printed.items()):
        raw = [
            max_batch_raw(gb, figure.model_gb["mixtral"], figure.sequence_tokens, 0.25, *pairs["mixtral"])
            for pairs in (figure.artifact, figure.printed)
        ]
        rows.append((gb, what, batch, *raw, raw[0] - batch))
    return section("figure_13", rows)


def figures_14_15() -> Section:
    """The seven fits of equation 2: printed RMSE, the same recomputed, and both forms scored alike at every point."""
    rows = []
    for curve in reference.curves():
        fitted, printed = (paper.fit_curve(curve, form) for form in ("fitted", "printed"))
        again = paper.rmse_as_printed(curve)
        rows.append(
            (curve.name, curve.printed_rmse, again, again - curve.printed_rmse, paper.rmse(curve, fitted),
             paper.rmse(curve, printed), fitted.c2, fitted.c3, fitted.c4)
        )  # fmt: skip
    same = sum(round(row[2], 2) == row[1] for row in rows)
    return section("figures_14_15", rows, same=same, curves=len(rows))


TABLE_4_CURVES = {"A40": "a40/mixtral/math_14k", "A100": "a100-80gb/mixtral", "H100": "h100-80gb/mixtral"}


def table_4() -> Section:
    """Dollars of 10 epochs from the curves' last points: of the queries that give what is printed, and of those that the text names."""
    by_name = {c.name: c for c in reference.curves()}
    priced = reference.cost_table()
    cases = [(*by_name[TABLE_4_CURVES[row.gpu]].kind("sparse")[-1], row, row.usd, (15000, 14000)) for row in priced]
    h100 = priced[-1]
    openorca = (None, h100.queries_per_second, h100, reference.raw()["table4_cost"]["openorca"]["usd"], (2.91e6, 2e6))
    rows: list[tuple[Any, ...]] = []
    for batch, rate, row, printed, queries in (*cases, openorca):
        usd = [count * 10 / rate / 3600 * row.usd_per_hour for count in queries]
        what = f"{row.gpu}, {'OpenOrca' if batch is None else f'batch {batch}'}"
        rows.append((what, rate, row.usd_per_hour, printed, usd[0], usd[0] - printed, usd[1]))
    return section("table_4", rows)


def paper_larger_half(curve: reference.Curve, data: curves.Observations) -> float:
    """Mean relative error of the paper's fitted form at the larger half, fitted to the smaller half."""
    small = curves.smaller_half(data)
    batch, sparsity, rate = paper.arrays(curve)
    fit = fit_equation2("fitted", batch[small], sparsity[small], rate[small], curve.c3)
    return float(np.mean(np.abs(fit.throughput(batch[~small], sparsity[~small]) / rate[~small] - 1)))


def bars(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What our model is held to, of the rows of `our_model`, and whether it meets it (1) or not (0)."""
    ratios = [r["ratio"] for r in records]
    half, theirs = (float(np.mean([r[column] for r in records])) / 100 for column in ("larger half %", "larger half, paper's %"))
    found = {"worst_ratio": max(ratios), "ratios_within_quarter": sum(r <= RATIO_FOUR_BAR for r in ratios)}
    met = found["worst_ratio"] <= RATIO_BAR and found["ratios_within_quarter"] >= 4 and half <= LARGER_HALF_BAR
    return found | {"larger_half_mean": half, "paper_larger_half_mean": theirs, "met": met}


def our_model() -> Section:
    """seconds = t0 + tokens·(u + v·k/E) on the same curves, scored like the paper's fitted form."""
    theirs = {c.name: paper.rmse(c, paper.fit_curve(c, "fitted")) for c in reference.curves()}
    ours, half = curves.whole_curve_rmse(), curves.larger_half_error()
    data = {c.name: c for c in curves.observations()}
    rows = []
    for curve in reference.curves():
        n = curve.name
        rows.append((n, theirs[n], ours[n], ours[n] / theirs[n], 100 * half[n], 100 * paper_larger_half(curve, data[n])))
    inside, total = curves.coverage()
    held = bars([dict(zip(_TEXT["our_model"]["columns"], row, strict=True)) for row in rows])
    limits = {"ratio_bar": RATIO_BAR, "four_bar": RATIO_FOUR_BAR, "half_bar": LARGER_HALF_BAR}
    return section("our_model", rows, inside=inside, total=total, **limits, **held)


def transfers() -> Section:
    """The A40's coefficients on the other GPUs' curves, by data-sheet figures alone."""
    rows = [(name, rule, 100 * size, 100 * signed) for (name, rule), (size, signed) in curves.transfer_errors().items()]
    return section("transfers", rows)
