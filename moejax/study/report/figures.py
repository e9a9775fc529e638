"""What the report's figures are drawn with: narrow enough for a phone, colours that a colour-blind reader tells apart, fixed by meaning."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

from moejax.study.report.svg import INK, PAPER, SETTINGS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 4.9  # inches
LEGEND_LETTERS, HEADING_LETTERS, TITLE_LETTERS = 58, 56, 46  # the most in a line; more is cut: the tables have every name in full
# Okabe and Ito's colours; shades of one where parts belong together.
ROUTING = {"sparse": "#0072B2", "dense": "#D55E00"}
PHASES = {
    "forward": "#0072B2", "recompute": "#56B4E9", "backward": "#D55E00", "optimizer": "#009E73", "other": "#8a8f98", "idle": "#c9ced6",
}  # fmt: skip
LAYERS = {
    "moe": "#D55E00", "attention": "#0072B2", "mamba": "#56B4E9", "norm": "#009E73", "lora": "#CC79A7", "layers": "#b59f00",
}  # fmt: skip
KERNELS = {
    "moe/w1": "#0b4f7d", "moe/w2": "#2f86c1", "moe/w3": "#8cc4ea", "moe/w1_dequant": "#a14600", "moe/w2_dequant": "#dd7c1f",
    "moe/w3_dequant": "#f3b878", "moe/router": "#009E73", "moe/router_dequant": "#7fd1b6", "moe/topk": "#CC79A7", "moe/act": "#d9c100",
    "moe/dispatch": "#6a4c93", "moe/combine": "#b39ad6", "moe/lora": "#8a5a44", "moe": "#8a8f98",
}  # fmt: skip
MARKERS, PACKED_MARKERS = ("o", "D", "^", "v", "p"), ("X", "P", "*", "<", ">")
BEFORE_AFTER = {"before": "#56B4E9", "after": "#D55E00"}
OTHER = "#8a8f98"
P = ParamSpec("P")


def drawn(function: Callable[P, Figure]) -> Callable[P, Figure]:
    """With the report's settings; the user's matplotlibrc and a screen play no part."""

    @wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> Figure:
        import matplotlib

        matplotlib.use("Agg")
        with matplotlib.rc_context(SETTINGS):
            return function(*args, **kwargs)

    return inner


@dataclass(frozen=True)
class Bar:
    """A bar's parts in one unit. `note` stands at its end."""

    label: str
    parts: Mapping[str, float]
    note: str = ""


@dataclass(frozen=True)
class Bars:
    """Bars under one heading."""

    heading: str
    bars: tuple[Bar, ...]


@drawn
def shares(blocks: Sequence[Bars], colors: Mapping[str, str], names: Callable[[str], str], xlabel: str) -> Figure:
    """Stacked bars, each its parts' shares of their sum."""
    from matplotlib.figure import Figure

    present = {part for block in blocks for bar in block.bars for part, value in bar.parts.items() if value > 0}
    order = [p for p in colors if p in present] + sorted(present - colors.keys())
    lines = sum(len(b.bars) + 1.1 for b in blocks)
    figure = Figure(figsize=(WIDTH, 0.24 * lines + 0.75 + _legend_height([names(p) for p in order], 3)), layout="constrained")
    axes = figure.subplots()
    y, ticks, labels = 0.0, [], []
    for block in blocks:
        # From the figure's edge: a long name of a device has the whole width.
        words = textwrap.shorten(block.heading, HEADING_LETTERS, placeholder=" …")
        heading = axes.annotate(words, (0.012, y + 0.1), xycoords=("figure fraction", "data"), fontweight="bold", va="center")
        heading.set_in_layout(False)
        y += 0.85
        for bar in block.bars:
            _share_bar(axes, y, bar, order, colors)
            ticks.append(y)
            labels.append(bar.label)
            y += 1
        y += 0.25
    axes.set_yticks(ticks, labels)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(y - 0.4, -0.5)
    axes.set_xlim(0, 118)
    axes.set_xticks(range(0, 101, 25))
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xlabel(xlabel)
    _legend(figure, [(names(p), dict(color=colors.get(p, OTHER))) for p in order])
    return figure


def _share_bar(axes: Any, y: float, bar: Bar, order: Sequence[str], colors: Mapping[str, str]) -> None:
    whole, left = sum(bar.parts.values()), 0.0
    for part in order:
        share = 100 * bar.parts.get(part, 0.0) / whole if whole else 0.0
        color = colors.get(part, OTHER)
        axes.barh(y, share, 0.78, left=left, color=color, edgecolor=PAPER, linewidth=0.5)
        if share >= 8:
            axes.text(left + share / 2, y, f"{share:.0f}", ha="center", va="center_baseline", color=_readable(color), fontsize=7.5)
        left += share
    axes.text(101.5, y, bar.note, ha="left", va="center_baseline", fontsize=7.5)


def _readable(color: str) -> str:
    """Black or white on it."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#ffffff"


@dataclass(frozen=True)
class Line:
    """Points of one curve; `marker`, `dash` and `hollow` as matplotlib has them; dash "": points alone."""

    label: str
    points: tuple[tuple[float, float], ...]
    color: str
    marker: str = "o"
    dash: str = "-"
    hollow: bool = False


@dataclass(frozen=True)
class Panel:
    title: str
    lines: tuple[Line, ...]
    xlabel: str
    ylabel: str


@drawn
def curves(panels: Sequence[Panel], *, xlog: bool = False, whole: bool = True, height: float = 2.2) -> Figure:
    """A panel under another. An axis of values is logarithmic where they span more than a factor of 20. whole: so are all x."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    entries = {
        line.label: dict(
            color=line.color, marker=line.marker, linestyle=line.dash or "none", markerfacecolor=PAPER if line.hollow else line.color
        )
        for panel in panels
        for line in panel.lines
    }
    figure = Figure(figsize=(WIDTH, height * len(panels) + _legend_height(entries, 2) + 0.1), layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        for line in panel.lines:
            xs, ys = zip(*line.points, strict=True)
            axes.plot(xs, ys, markersize=4, linewidth=1.3, **entries[line.label])
        values = [y for line in panel.lines for _, y in line.points if y > 0]
        axes.set_title(_wrapped(panel.title, TITLE_LETTERS))
        axes.set_xlabel(panel.xlabel)
        axes.set_ylabel(panel.ylabel)
        axes.grid(axis="y", which="major")
        if values and max(values) > 20 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_ylim(0, 1.08 * max(values, default=1))
        if xlog:
            ticks = sorted({x for line in panel.lines for x, _ in line.points})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
            axes.minorticks_off()
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=whole, min_n_ticks=1))
    _legend(figure, list(entries.items()), most=2)
    return figure


@dataclass(frozen=True)
class Dots:
    """Values of one setting by the names of the lines."""

    label: str
    values: Mapping[str, float]
    color: str
    marker: str = "o"
    hollow: bool = False


@drawn
def dots(
    panels: Sequence[tuple[str, str, Sequence[Dots], Sequence[str]]], names: Callable[[str], str], scale: float = 100
) -> Figure:
    """Panels of (title, label of the values, settings, the lines from the top): values times `scale`, each setting with its sign."""
    from matplotlib.figure import Figure

    entries = {
        d.label: dict(color=d.color, marker=d.marker, linestyle="none", markerfacecolor=PAPER if d.hollow else d.color)
        for _, _, settings, _ in panels
        for d in settings
    }
    heights = [0.21 * len(order) + 0.6 for *_, order in panels]
    figure = Figure(figsize=(WIDTH, sum(heights) + _legend_height(entries, 2)), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    for axes, (title, xlabel, settings, order) in zip(grid[:, 0], panels, strict=True):
        for setting in settings:
            points = [(scale * v, y) for y, name in enumerate(order) if (v := setting.values.get(name)) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), markersize=4.5, clip_on=False, zorder=3, **entries[setting.label])
        axes.set_title(title)
        axes.set_yticks(range(len(order)), [names(n) for n in order])
        axes.set_ylim(len(order) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.grid(axis="both")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(xlabel)
    _legend(figure, list(entries.items()), most=2)
    return figure


@drawn
def grouped(
    panels: Sequence[tuple[str, Sequence[str], Mapping[str, Sequence[float]]]], colors: Mapping[str, str], xlabel: str, ylabel: str
) -> Figure:
    """Upright bars side by side: panels of (title, names of the groups, series -> a value for each group), two in a row; where one has
    many groups each in a row of its own, with every so many of the names."""
    from matplotlib.figure import Figure

    most = max((len(groups) for _, groups, _ in panels), default=0)
    columns, names = (2, 16) if most <= 16 else (1, 24)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH, 1.9 * rows + 0.35), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (title, groups, series) in zip(grid.flat, panels, strict=False):
        width = 0.84 / len(series)
        for i, (name, values) in enumerate(series.items()):
            xs = [x + (i - (len(series) - 1) / 2) * width for x in range(len(groups))]
            axes.bar(xs, values, width, color=colors[name], edgecolor=PAPER, linewidth=0.3)
        axes.set_title(_wrapped(title, TITLE_LETTERS // columns + 3), fontsize=7.5)
        shown_names = range(0, len(groups), -(-len(groups) // names))
        axes.set_xticks(shown_names, [groups[i] for i in shown_names], fontsize=7.5)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    shown = {name for _, _, series in panels for name in series}
    _legend(figure, [(name, dict(color=color)) for name, color in colors.items() if name in shown])
    return figure


def _columns(labels: Iterable[str], most: int) -> int:
    """How many columns of a legend fit side by side: letters and signs are some 0.072 inches wide."""
    longest = max((min(len(label), LEGEND_LETTERS) for label in labels), default=1)
    return max(1, min(most, int(WIDTH / 0.072 / (longest + 6))))


def _legend_height(labels: Collection[str], most: int) -> float:
    """Inches of the legend of these."""
    return 0.19 * -(-len(labels) // _columns(labels, most))


def _wrapped(words: str, letters: int) -> str:
    """At most two lines of so many letters; where there are two already, each by itself."""
    if "\n" in words:
        return "\n".join(textwrap.shorten(line, letters, placeholder=" …") for line in words.splitlines())
    lines = textwrap.wrap(words, letters)
    return "\n".join(lines if len(lines) <= 2 else [lines[0], textwrap.shorten(" ".join(lines[1:]), letters, placeholder=" …")])


def _legend(figure: Figure, entries: Sequence[tuple[str, dict[str, Any]]], most: int = 3) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    labels = [textwrap.shorten(name, LEGEND_LETTERS, placeholder=" …") for name, _ in entries]
    columns = _columns(labels, most)
    handles = [
        Line2D([], [], label=name, markersize=4.5, linewidth=1.3, **style) if "marker" in style else Patch(label=name, **style)
        for name, (_, style) in zip(labels, entries, strict=True)
    ]
    figure.legend(
        handles=handles, loc="outside lower left", ncols=columns, fontsize=7.5, handlelength=1.6, columnspacing=1.2, labelcolor=INK
    )

