"""The estimator's figure: hours against dollars; and how the study's are drawn as well."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from moejax.estimator.job import Job
from moejax.estimator.plan import Prediction
from moejax.estimator.units import counted
from moejax.files import save_figure

if TYPE_CHECKING:
    from moejax.estimator.tools.forecast import Forecast

INK, BLUE, ORANGE, GREY = "#222222", "#2b6cb0", "#dd6b20", "#a0aec0"


def clean(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)


def save(figure: Any, path: Path) -> Path:
    save_figure(figure, path, dpi=150)
    plt.close(figure)
    return path


def options(folder: Path, title: str, found: Sequence[Prediction | Forecast]) -> list[Path]:
    """Hours and dollars of every option with their intervals, cheapest on top."""
    shown = list(reversed(found))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 1.2 + 0.42 * len(shown)), sharey=True, layout="constrained")
    for place, p in enumerate(shown):
        color = BLUE if p.measured else GREY
        for axes, value, interval in ((left, p.hours, p.hours_interval), (right, p.usd, p.usd_interval)):
            if interval is not None:
                axes.plot(interval, (place, place), color=color, lw=2, solid_capstyle="butt")
            if value is not None:
                axes.plot(value, place, "o", color=color)
    labels = [p.named if p.price is None else f"{p.named}, {p.price.seller}, {p.price.day}" for p in shown]
    left.set_yticks(range(len(shown)), labels)
    left.set(xlabel="hours", ylim=(-0.6, len(shown) - 0.4))
    right.set(xlabel="USD")
    for axes in (left, right):
        axes.set_xlim(left=0)
        axes.grid(axis="x", color=GREY, alpha=0.3)
        clean(axes)
    figure.suptitle(title, fontsize=10)
    return [save(figure, folder / "plan.png")]


def title(job: Job) -> str:
    """Of the figure of a study's job."""
    return f"{_named(job)}, {counted(job.queries, 'query', 'queries')} x {counted(job.epochs, 'epoch')} (grey: carried over, not measured)"


def _named(job: Job) -> str:
    model = {"mixtral": "Mixtral-8x7B", "blackmamba": "BlackMamba-2.8B"}[job.model]
    method = {"qlora": "QLoRA", "lora": "LoRA", "full": "full fine-tuning"}[job.method]
    return f"{model}, {method}, k = {job.experts_per_token}"
