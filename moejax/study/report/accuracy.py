"""Accuracy by epoch of several runs, next to the study's Figure 3: `moejax compare`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from moejax.errors import UserError
from moejax.evaluation.recorded import ScoredRun, open_scored, percent
from moejax.files import save_figure
from moejax.study import reference
from moejax.study.reference import REFERENCE
from moejax.terminal import Console

COLORS = {"sparse": "#2b6cb0", "dense": "#dd6b20"}
LINES = ("-", "--", ":", "-.")
SUFFIXES = (".png", ".svg", ".pdf")
WIDE = 120  # characters, where the output is no terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, e.g. runs/demo_sparse")
    parser.add_argument("--plot", default=None, metavar="FILE", help="output file for the figure: .png, .svg or .pdf")


def run(options: argparse.Namespace) -> int:
    """Print the tables, and draw the figure where --plot names its file. Raises UserError for what is no such run, or runs that answer
    other questions."""
    runs = [open_scored(Path(folder)) for folder in options.runs]
    _check_same(runs)
    path = None if options.plot is None else _check_plot(Path(options.plot))
    console = Console(WIDE)
    console.print(table(runs))
    for line in pairs(runs):
        console.print(line, soft_wrap=True)
    console.print(study_table())
    if path is not None:
        draw(runs, path)
        console.print(str(path), soft_wrap=True)
    return 0


def _check_same(runs: Sequence[ScoredRun]) -> None:
    first = runs[0]
    for other in runs[1:]:
        for name in ("task", "data", "split", "limit"):
            a, b = getattr(first.asked, name), getattr(other.asked, name)
            if a != b:
                raise UserError(
                    f"{first.folder} has eval.{name} = {a}, {other.folder} {b}: they answer other questions and cannot be compared"
                )


def _check_plot(path: Path) -> Path:
    if path.suffix not in SUFFIXES:
        raise UserError(f"--plot {path}: expected a file that ends in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise UserError(f"--plot {path}: there is no folder {path.parent}")
    return path


def best_step(run: ScoredRun) -> int:
    """The evaluated step with the highest accuracy, the first of equal ones."""
    return max(sorted(run.results), key=lambda step: run.results[step]["eval/accuracy"])


def reached_step(run: ScoredRun) -> int:
    """The first step whose accuracy lies in the 95 % interval of the best."""
    low = run.results[best_step(run)]["eval/accuracy_low"]
    return next(step for step in sorted(run.results) if run.results[step]["eval/accuracy"] >= low)


def _at(run: ScoredRun, step: int) -> str:
    return f"epoch {run.results[step]['eval/epoch']:.4g}"


def table(runs: Sequence[ScoredRun]) -> Table:
    """A row for each epoch, a column for each run, and under them what sums a run up."""
    asked, first = runs[0].asked, runs[0].results
    count = next(iter(first.values()))["eval/problems"]
    out = Table(title=f"{asked.task}: right answers to {count:.0f} problems of {asked.data}, with 95 % interval", title_justify="left")
    out.add_column("epoch", justify="right")
    for r in runs:
        experts = "" if r.top_k is None else f"\n{r.kind}, {r.top_k} of {r.experts} experts"
        out.add_column(f"{r.name}{experts}", justify="right")
    for epoch in sorted({epoch for r in runs for epoch in r.by_epoch}):
        out.add_row(f"{epoch:.4g}", *(percent(r.by_epoch[epoch]) if epoch in r.by_epoch else "" for r in runs))
    out.add_section()
    out.add_row("best", *(f"{100 * r.results[best_step(r)]['eval/accuracy']:.1f} %, {_at(r, best_step(r))}" for r in runs))
    out.add_row("first in the best's interval", *(_at(r, reached_step(r)) for r in runs))
    if any("eval/loss" in r.results[max(r.results)] for r in runs):
        out.add_row("loss, last", *(f"{r.results[max(r.results)].get('eval/loss', math.nan):.4f}" for r in runs))
        losses = [{s: x["eval/loss"] for s, x in sorted(r.results.items()) if "eval/loss" in x} for r in runs]
        lowest = [min(each, key=each.__getitem__, default=None) for each in losses]
        cells = ["" if s is None else f"{each[s]:.4f}, {_at(r, s)}" for r, s, each in zip(runs, lowest, losses, strict=True)]
        out.add_row("loss, lowest", *cells)
    out.add_row("median step", *("" if r.step_seconds is None else f"{1e3 * r.step_seconds:.1f} ms" for r in runs))
    return out


def pairs(runs: Sequence[ScoredRun]) -> list[str]:
    """The last evaluation of the first run against that of every other, problem by problem."""
    lines = []
    first = runs[0]
    for other in runs[1:]:
        mine, theirs = (r.predictions(max(r.results)) for r in (first, other))
        if [(p["prompt"], p["expected"]) for p in mine] != [(p["prompt"], p["expected"]) for p in theirs]:
            raise UserError(f"{first.folder} and {other.folder} were asked other problems: has {first.asked.data} changed between them?")
        ours = sum(a["correct"] and not b["correct"] for a, b in zip(mine, theirs, strict=True))
        others = sum(b["correct"] and not a["correct"] for a, b in zip(mine, theirs, strict=True))
        lines.append(
            f"last of {first.name} and {other.name}, problem by problem: {ours} right in the first alone, {others} in the second alone "
            f"(p = {sign_test(ours, others):.2g} if both were equally good)"
        )
    return lines


def sign_test(a: int, b: int) -> float:
    """McNemar's exact test: how probable a split of a + b as uneven as this one, or more, is where each falls to either side alike."""
    n = a + b
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(a, b) + 1)) / 2**n)


DATASETS = {"hellaswag": "HellaSwag", "gsm8k": "GSM8K"}


def study_table() -> Table:
    """What the study's Figure 3 has of each model and data set."""
    out = Table(title="the study's Figure 3 (its published data): accuracy, no intervals given", title_justify="left")
    for column in ("model, data", "experts", "untrained", "after epoch 1", "best", "after epoch 10"):
        out.add_column(column, justify="left" if column in ("model, data", "experts") else "right")
    for (model, data, kind), curve in reference.accuracy_by_epoch().items():
        top = curve.index(max(curve))
        cells = [f"{100 * v:.1f} %" for v in (curve[0], curve[1], curve[top], curve[-1])]
        cells[2] += f", epoch {top}"
        out.add_row(f"{REFERENCE[model]}, {DATASETS[data]}", kind, *cells)
    return out


def draw(runs: Sequence[ScoredRun], path: Path) -> None:
    """Ours (with 95 % intervals), and one panel for each of the study's data sets. Blue is sparse and orange dense throughout."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    ours, *studies = figure.subplots(1, 3, sharey=True)
    seen: dict[str, int] = {}
    for r in runs:
        style = LINES[seen.setdefault(r.kind, 0) % len(LINES)]
        seen[r.kind] += 1
        epochs = list(r.by_epoch)
        share, low, high = ([100 * x[f"eval/accuracy{end}"] for x in r.by_epoch.values()] for end in ("", "_low", "_high"))
        k = "" if r.top_k is None else f" ({r.kind}, {r.top_k} of {r.experts})"
        ours.fill_between(epochs, low, high, color=COLORS[r.kind], alpha=0.15, linewidth=0)
        ours.plot(epochs, share, style, color=COLORS[r.kind], marker="o", markersize=3.5, label=f"{r.name}{k}")
    ours.set_title(f"these runs: {runs[0].asked.task}, with 95 % interval", fontsize=10)
    curves = reference.accuracy_by_epoch()
    for axes, data in zip(studies, DATASETS, strict=True):
        for index, model in enumerate(REFERENCE):
            for kind, color in COLORS.items():
                curve = [100 * v for v in curves[model, data, kind]]
                axes.plot(curve, LINES[index], color=color, marker="os"[index], markersize=3.5, label=f"{REFERENCE[model]}, {kind}")
        axes.set_title(f"the study's Figure 3: {DATASETS[data]}", fontsize=10)
    ours.set_ylabel("right answers, %")
    ours.set_ylim(0, 103)
    for axes in (ours, *studies):
        axes.set_xlabel("epoch")
        axes.grid(axis="y", color="#e2e8f0", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    ours.legend(fontsize=8, frameon=False, loc="lower right")
    figure.legend(*studies[0].get_legend_handles_labels(), fontsize=8, frameon=False, ncols=4, loc="outside lower right")
    save_figure(figure, path, dpi=130)
