"""Figures of the estimator: throughput over batch, hours against dollars, and what a fit leaves."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from moejax.estimator.coefficients import Entry, choose
from moejax.estimator.fitting import Fitted
from moejax.estimator.job import Job
from moejax.estimator.plan import Plan, Prediction, batches
from moejax.estimator.units import counted
from moejax.files import save_figure
from moejax.gpus import GPU, find

INK, BLUE, ORANGE, GREY, GREEN = "#222222", "#2b6cb0", "#dd6b20", "#a0aec0", "#2f855a"
COLORS = (BLUE, ORANGE, GREEN, INK, GREY)


def clean(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)


def save(figure: Any, path: Path) -> Path:
    save_figure(figure, path, dpi=150)
    plt.close(figure)
    return path


def throughput(folder: Path, job: Job, found: Sequence[Prediction], entries: Sequence[Entry], table: dict[str, GPU]) -> list[Path]:
    """Queries per second over batch on each GPU, with intervals and the batch that was predicted for."""
    figure, axes = plt.subplots(figsize=(6.8, 4), layout="constrained")
    for p, color in zip(found, cycle(COLORS), strict=False):
        step = choose(entries, job.model, job.method, find(p.gpu, table), table)
        batch = np.array(batches(min(max(p.fits, p.batch, 2), job.largest_batch)))
        tokens = [job.tokens(int(b)) for b in batch]
        rate = [b / step.seconds(t, job.share) for b, t in zip(batch, tokens, strict=True)]
        axes.plot(batch, rate, color=color, ls="-" if p.measured else "--", label=p.gpu + ("" if p.measured else " (carried over)"))
        ends = [step.interval(t, job.share) for t in tokens]
        if None not in ends:
            low, high = zip(*((b / e[1], b / e[0]) for b, e in zip(batch, ends, strict=True) if e), strict=True)
            axes.fill_between(batch, low, high, color=color, alpha=0.15, lw=0)
        axes.plot(p.batch, p.queries_per_second, "o", color=color)
    axes.set(xlabel="batch, queries", ylabel="queries per second", title=_named(job))
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    clean(axes)
    return [save(figure, folder / "throughput.png")]


def options(folder: Path, job: Job, made: Plan) -> list[Path]:
    """Hours and dollars of every option with their intervals, cheapest on top."""
    shown = list(reversed(made.options))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 1.2 + 0.42 * len(shown)), sharey=True, layout="constrained")
    for place, p in enumerate(shown):
        color = BLUE if p.measured else GREY
        for axes, value, interval in ((left, p.hours, p.hours_interval), (right, p.usd, p.usd_interval)):
            if interval is not None:
                axes.plot(interval, (place, place), color=color, lw=2, solid_capstyle="butt")
            if value is not None:
                axes.plot(value, place, "o", color=color)
    labels = [p.gpu if p.price is None else f"{p.gpu}, {p.price.seller}, {p.price.day}" for p in shown]
    left.set_yticks(range(len(shown)), labels)
    left.set(xlabel="hours", ylim=(-0.6, len(shown) - 0.4))
    right.set(xlabel="USD")
    for axes in (left, right):
        axes.set_xlim(left=0)
        axes.grid(axis="x", color=GREY, alpha=0.3)
        clean(axes)
    title = f"{_named(job)}, {counted(job.queries, 'query', 'queries')} x {counted(job.epochs, 'epoch')} (grey: carried over, not measured)"
    figure.suptitle(title, fontsize=10)
    return [save(figure, folder / "plan.png")]


def _named(job: Job) -> str:
    model = {"mixtral": "Mixtral-8x7B", "blackmamba": "BlackMamba-2.8B"}[job.model]
    method = {"qlora": "QLoRA", "lora": "LoRA", "full": "full fine-tuning"}[job.method]
    return f"{model}, {method}, k = {job.experts_per_token}"


def residuals(folder: Path, found: Sequence[Fitted]) -> list[Path]:
    """Seconds over tokens with the fitted law, and each run's error, device by device."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained")
    for f, color in zip(found, cycle(COLORS), strict=False):
        for share in sorted({run.share for run in f.runs}):
            runs = [(run, error) for run, error in zip(f.runs, f.errors, strict=True) if run.share == share]
            tokens = np.linspace(0, 1.05 * max(run.tokens for run, _ in runs), 50)
            t0, u, v = f.entry.coefficients
            left.plot(tokens, t0 + tokens * (u + v * share), color=color, lw=1)
            left.plot([r.tokens for r, _ in runs], [r.seconds for r, _ in runs], "o", color=color, label=f"{f.entry.gpu}, k/E {share:g}")
            right.plot([r.tokens for r, _ in runs], [100 * e for _, e in runs], "o", color=color)
    left.set(xlabel="tokens a step", ylabel="seconds a step", xlim=(0, None), ylim=(0, None))
    left.legend(frameon=False, fontsize=8)
    right.axhline(0, color=GREY, lw=1)
    right.set(xlabel="tokens a step", ylabel="predicted over measured, less 1, %")
    for axes in (left, right):
        clean(axes)
    return [save(figure, folder / "fit.png")]
