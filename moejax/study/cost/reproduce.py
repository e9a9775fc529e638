"""The study's Tables III and IV and Figures 13, 14 and 15 recomputed from its published data, beside what it prints; then our model."""

from __future__ import annotations

from dataclasses import dataclass
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
    notes = (
        "Equation 1 takes the longest query's tokens (512, and 1024 by the cut): so it gives the largest batch of every published sweep.",
        "Printed below that: Mixtral MATH sparse (3, swept to 4; Table IV too uses 4), BlackMamba MATH (2 and 8, swept to 3 and 10).",
        "The printed C0 = 82, C1 = 0.95 of Mixtral give 13 where 8 is printed: Figure 13 was drawn with 62 and 0.89.",
    )
    columns = ("model", "data set", "kind", "printed", "swept", "C0/C1 printed", "C0/C1 artifact", "difference")
    return Section("table_3", "Table III: largest batch on an A40 of 48 GB (equation 1)", columns, tuple(rows), notes)


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
    notes = (
        "C0 = 62, C1 = 0.89, 512 tokens is what the figure shows; no one rounding rule gives 6, 8, 28, 35 from 6.06, 8.98, 27.92, 35.20.",
        "The printed C0 = 82, C1 = 0.95 miss all of them. At 80 GB neither pair gives the measured 27; Table IV's 17 there is MATH's.",
    )
    columns = ("GB", "what", "printed", "C0/C1 artifact", "C0/C1 printed", "difference")
    return Section("figure_13", "Figure 13: Mixtral's largest batch (equation 1, before rounding)", columns, tuple(rows), notes)


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
    notes = (
        f"difference: recomputed less printed; {same} of {len(rows)} recomputed round to the two digits that are printed.",
        "Printed: C2·ln(batch/(sparsity·C3)) + C4. Fitted by the artifact: C2·ln(batch^(1/(sparsity·C3))) + C4 (its C2 to C4 here).",
        "The printed RMSE score dense points without the exponent (H100: the first one; its others with the sparse exponent).",
    )
    columns = ("curve", "printed RMSE", "recomputed", "difference", "fitted form, scored alike", "printed form", "C2", "C3", "C4")
    return Section("figures_14_15", "Figures 14 and 15: RMSE of equation 2, queries/s", columns, tuple(rows), notes)


TABLE_4_CURVES = {"A40": "a40/mixtral/math_14k", "A100": "a100-80gb/mixtral", "H100": "h100-80gb/mixtral"}


def table_4() -> Section:
    """Dollars of 10 epochs from the curves' last points."""
    by_name = {c.name: c for c in reference.curves()}
    rows: list[tuple[Any, ...]] = []
    for row in reference.cost_table():
        batch, rate = by_name[TABLE_4_CURVES[row.gpu]].kind("sparse")[-1]
        dollars = [paper.usd(queries, 10, rate, row.usd_per_hour) for queries in (15000, 14000)]
        rows.append((f"{row.gpu}, batch {batch}", rate, row.usd_per_hour, row.usd, dollars[0], dollars[0] - row.usd, dollars[1]))
    orca = reference.raw()["table4_cost"]["openorca"]
    h100 = reference.cost_table()[-1]
    dollars = [paper.usd(queries, 10, h100.queries_per_second, h100.usd_per_hour) for queries in (2.91e6, 2e6)]
    printed = orca["usd"]
    rows.append(("H100, OpenOrca", h100.queries_per_second, h100.usd_per_hour, printed, dollars[0], dollars[0] - printed, dollars[1]))
    notes = (
        "The printed dollars are those of 15,000 queries and 10 epochs; the caption names MATH, which has 14,000 (last column).",
        "OpenOrca: 3,460 follows from 2.91 M queries; 'more than 2M' is printed (2 M in the last column). Prices: CUDO, 2024.",
    )
    columns = ("GPU", "queries/s", "USD/h", "printed USD", "recomputed", "difference", "with the caption's queries")
    return Section("table_4", "Table IV: dollars of fine-tuning", columns, tuple(rows), notes)


def paper_larger_half(curve: reference.Curve, data: curves.Observations) -> float:
    """Mean relative error of the paper's fitted form at the larger half, fitted to the smaller half."""
    small = curves.smaller_half(data)
    batch, sparsity, rate = paper.arrays(curve)
    fit = fit_equation2("fitted", batch[small], sparsity[small], rate[small], curve.c3)
    return float(np.mean(np.abs(fit.throughput(batch[~small], sparsity[~small]) / rate[~small] - 1)))


@dataclass(frozen=True)
class Bars:
    """The figures that our model is held to, and whether it meets them."""

    worst_ratio: float
    ratios_within_quarter: int
    larger_half_mean: float
    paper_larger_half_mean: float

    @property
    def met(self) -> bool:
        return (
            self.worst_ratio <= RATIO_BAR and self.ratios_within_quarter >= 4 and self.larger_half_mean <= LARGER_HALF_BAR
        )


def bars() -> Bars:
    """From the same rows that are printed."""
    records = our_model().records()
    ratios = [r["ratio"] for r in records]
    halves = [r["larger half %"] / 100 for r in records]
    theirs = [r["larger half, paper's %"] / 100 for r in records]
    return Bars(max(ratios), sum(r <= RATIO_FOUR_BAR for r in ratios), float(np.mean(halves)), float(np.mean(theirs)))


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
    mean = [float(np.mean([row[i] for row in rows])) for i in (4, 5)]
    ratios = [row[3] for row in rows]
    notes = (
        f"bar: every ratio at most {RATIO_BAR} -> largest {max(ratios):.3f}; at most {RATIO_FOUR_BAR} on 4 curves -> "
        f"on {sum(r <= RATIO_FOUR_BAR for r in ratios)} (three coefficients a curve, fitted to throughput)",
        f"bar: larger half of the batch sizes, mean over curves, at most {100 * LARGER_HALF_BAR} % -> {mean[0]:.2f} % (13 coefficients, "
        f"pooled by chip, fitted to the smaller half's seconds); the paper's form: {mean[1]:.2f} %",
        f"95 % intervals from the smaller halves hold {inside} of the {total} points of the larger halves.",
        "Figure 15's curves with MATH lengths (docs/estimator.md says why).",
    )
    columns = ("curve", "paper's RMSE", "ours", "ratio", "larger half %", "larger half, paper's %")
    return Section("our_model", "Our model: seconds = t0 + tokens·(u + v·k/E)", columns, tuple(rows), notes)


def transfers() -> Section:
    """The A40's coefficients on the other GPUs' curves, by data-sheet figures alone."""
    rows = [(name, rule, 100 * size, 100 * signed) for (name, rule), (size, signed) in curves.transfer_errors().items()]
    notes = ("optimistic: t0 by bandwidth, u and v by peak FLOP/s; host-bound: t0 unchanged; as it is: nothing faster than the A40.",)
    columns = ("curve", "rule", "mean error %", "signed %")
    return Section("transfers", "The A40's Mixtral coefficients carried to other GPUs", columns, tuple(rows), notes)
