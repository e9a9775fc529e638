"""Where a step's time goes, as the study draws it: bars by phase (Figure 4), layer (5) and MoE kernel (6), the study's next to ours.

The study's seconds are an A40's; bars are shares of a whole, with the seconds above them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moejax.files import save_figure
from moejax.profiling.scopes import COLLECTIVES, PHASES

STUDY = Path(__file__).with_name("study_bars.json")  # written by `python -m moejax.study.publish`
KERNELS = (
    "moe/w1", "moe/w2", "moe/w3", "moe/w1_dequant", "moe/w2_dequant", "moe/w3_dequant", "moe/router", "moe/router_dequant", "moe/topk",
    "moe/act",
)  # fmt: skip
MATMULS = ("moe/w1", "moe/w2", "moe/w3", "moe/router", "moe/lora")
NO_LAYERS = ("embed", "loss", "head_dequant", "optimizer", "other")


@dataclass(frozen=True)
class Bars:
    """One run's (or one of the study's settings') seconds per step. The study has kernels of one MoE layer only: shares compare."""

    name: str
    phases: Mapping[str, float]
    layers: Mapping[str, float]
    kernels: Mapping[str, float]
    ours: bool = True
    idle: float | None = None
    utilization: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # kernel -> SM, DRAM: the study's, by Nsight Compute


def study(model: str, kind: str) -> list[Bars]:
    """The study's bars: model "mixtral" or "blackmamba", kind "sparse" or "dense"; smallest batch first."""
    rows = [row for row in json.loads(STUDY.read_text(encoding="utf-8")) if (row["model"], row["kind"]) == (model, kind)]
    return [Bars(ours=False, **{part: row[part] for part in ("name", "phases", "layers", "kernels", "utilization")}) for row in rows]


ALL = "all, by time"
"""Utilization of the whole mixture of experts: its kernels', weighted by their time."""


def takeaways(bars: Bars) -> dict[str, float | None]:
    """The study's observations, computed: shares of the busy step, or of the MoE's time. None where the bars do not say."""
    step, moe = sum(bars.phases.values()), sum(bars.kernels.values())
    layers = sum(v for k, v in bars.layers.items() if k not in NO_LAYERS)
    matmul = sum(v for k, v in bars.kernels.items() if k in MATMULS)
    dequant = sum(v for k, v in bars.kernels.items() if k.endswith("_dequant"))
    backward, recompute = bars.phases.get("backward", 0.0), bars.phases.get("recompute")

    def share(part: float | None, whole: float) -> float | None:
        return part / whole if part is not None and whole else None

    return {
        "MoE, of the layers' time": share(bars.layers.get("moe"), layers),
        "matrix products, of the MoE's time": share(matmul, moe),
        "dequantization, of the MoE's time": share(dequant, moe),
        "optimizer, of the step": share(bars.phases.get("optimizer", 0.0), step),
        # The study's backward pass holds its recomputation: gradient checkpointing runs inside it.
        "backward with recomputation / forward": share(backward + (recompute or 0.0), bars.phases.get("forward", 0.0)),
        "recomputation, of the step": share(recompute, step),
    }


def draw(runs: Sequence[Bars], folder: Path) -> list[Path]:
    """phases, layers and moe_kernels, each as PNG and SVG. Returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (what, ylabel, title) in _FIGURES.items():
        if with_it := [b for b in runs if getattr(b, what)]:
            written += _stacked(with_it, what, ylabel, title, folder / name)
    return written


_FIGURES = {
    "phases": ("phases", "share of the step's busy time", "A step by phase (the study's Figure 4)"),
    "layers": ("layers", "share of the step's busy time", "A step by kind of layer (the study's Figure 5)"),
    "moe_kernels": ("kernels", "share of the MoE's time", "The mixture of experts by kernel (the study's Figure 6)"),
}


def _seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * scale >= 1:
            return f"{value * scale:.3g} {unit}"
    return f"{value * 1e6:.2g} µs"


def _order(runs: Sequence[Bars], what: str) -> list[str]:
    """Parts by their largest share in any bar; phases in the order in which they happen."""
    shares: dict[str, float] = {}
    for bars in runs:
        values = getattr(bars, what)
        whole = sum(values.values()) or 1.0
        for name, value in values.items():
            shares[name] = max(shares.get(name, 0.0), value / whole)
    if what == "phases":
        return [p for p in (*PHASES, COLLECTIVES) if shares.get(p)]
    return [n for n in sorted(shares, key=lambda n: -shares[n]) if shares[n] > 0]


def _stacked(runs: Sequence[Bars], what: str, ylabel: str, title: str, path: Path) -> list[Path]:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.4, 2.6 + 1.25 * len(runs)), 4.6), layout="constrained")
    axes = figure.subplots()
    palette = colormaps["tab20"].colors  # type: ignore[attr-defined]
    bottoms = [0.0] * len(runs)
    for index, part in enumerate(_order(runs, what)):
        shares = [100 * getattr(b, what).get(part, 0.0) / sum(getattr(b, what).values()) for b in runs]
        axes.bar(
            range(len(runs)), shares, 0.62, bottom=bottoms, color=palette[index % 20], label=_label(part, what),
            edgecolor="white", linewidth=0.4,
        )  # fmt: skip
        for x, (share, bottom) in enumerate(zip(shares, bottoms, strict=True)):
            if share >= 5:
                axes.text(x, bottom + share / 2, f"{share:.0f}", ha="center", va="center", fontsize=7)
        bottoms = [b + s for b, s in zip(bottoms, shares, strict=True)]
    unit = "one layer" if what == "kernels" else "a step"
    for x, bars in enumerate(runs):
        total = _seconds(sum(getattr(bars, what).values()))
        axes.text(x, 101.5, total if bars.ours else f"{total}\n({unit})", ha="center", va="bottom", fontsize=7)
    axes.set_xticks(range(len(runs)), [b.name for b in runs], fontsize=7)
    axes.set_ylim(0, 115)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel(f"{ylabel}, %")
    axes.set_title(title, fontsize=10)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def _label(part: str, what: str) -> str:
    return "rest of the MoE" if (part, what) == ("moe", "kernels") else part.removeprefix("moe/")


def _save(figure: Any, path: Path) -> list[Path]:
    files = [path.with_suffix(f".{kind}") for kind in ("png", "svg")]
    for file in files:
        save_figure(figure, file, dpi=130)
    return files
