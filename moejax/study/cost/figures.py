"""Figures 13 to 15 next to both models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator

from moejax.estimator.equations import max_batch_raw
from moejax.estimator.figures import BLUE, INK, ORANGE, clean, plt, save
from moejax.estimator.lengths import of_study
from moejax.study import reference
from moejax.study.cost import curves, paper
from moejax.study.cost.step_time import features, fit


def reproduction(folder: Path) -> list[Path]:
    """Figure 13, and Figures 14 and 15 with the paper's fit and ours."""
    return [_figure_13(folder / "figure_13.png"), _figures_14_15(folder / "figures_14_15.png")]


def _figure_13(path: Path) -> Path:
    given = reference.max_batch_figure()
    gb = np.linspace(24, 125, 200)
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    pairs = ((given.artifact, BLUE, "artifact"), (given.printed, ORANGE, "printed"))
    for pair, color, label in pairs:
        c0, c1 = pair["mixtral"]
        batch = [max_batch_raw(g, given.model_gb["mixtral"], given.sequence_tokens, 0.25, c0, c1) for g in gb]
        axes.plot(gb, batch, color=color, label=f"equation 1, {label} C0 = {c0:g}, C1 = {c1:g}")
    axes.plot(*zip(*given.ground_truth.items(), strict=True), "o", color=INK, label="measured by the study")
    axes.plot(*zip(*given.printed_projection.items(), strict=True), "D", mfc="white", color=INK, label="projected by the study")
    axes.set(xlabel="GPU memory, GB", ylabel="largest batch, queries", title="Figure 13: Mixtral, commonsense, 2 of 8 experts")
    axes.legend(frameon=False)
    clean(axes)
    return save(figure, path)


def _figures_14_15(path: Path) -> Path:
    data = {c.name: c for c in curves.observations()}
    ours = fit(list(data.values()), loss="throughput")
    figure, grid = plt.subplots(2, 4, figsize=(13, 6.2), layout="constrained")
    panels = list(grid.flat)
    for axes, curve in zip(panels, reference.curves(), strict=False):
        theirs = paper.fit_curve(curve, "fitted")
        lengths = of_study(curve.dataset or curves.FIGURE_15_DATASET)
        for kind, color in (("sparse", BLUE), ("dense", ORANGE)):
            points = curve.kind(kind)
            share = reference.EXPERTS_PER_TOKEN[kind] / reference.EXPERTS
            axes.plot(*zip(*points, strict=True), "o", ms=4.5, color=color, label=f"{kind}, measured")
            batch = np.arange(1, max(b for b, _ in points) + 1)
            tokens = np.array([lengths.batch_tokens(int(b)) for b in batch])
            seconds = features(tokens, np.full(len(batch), share)) @ ours[curve.name].coefficients
            axes.plot(batch, batch / seconds, color=color, label=f"{kind}, ours")
            smooth = np.linspace(1, batch[-1], 80)
            axes.plot(smooth, theirs.throughput(smooth, np.full(80, share)), ":", color=color, label=f"{kind}, the paper's form")
        axes.set_title(curve.name.replace("commonsense_15k", "commonsense").replace("math_14k", "MATH"), fontsize=10)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        clean(axes)
    panels[-1].axis("off")
    panels[-1].legend(*panels[0].get_legend_handles_labels(), loc="center", frameon=False)
    figure.supxlabel("batch, queries")
    figure.supylabel("queries per second")
    return save(figure, path)
