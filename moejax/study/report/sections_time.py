"""Where a step's time goes: Figures 4, 5 and 6; how busy the device is meanwhile: Figures 9 and 10."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moejax.profiling import bars as step_bars
from moejax.study import reference
from moejax.study.report import figures
from moejax.study.report.compare import DENSE, LARGEST, ONE, Source, batches, role
from moejax.study.report.grid import Grid, derived, published
from moejax.study.report.naming import REFERENCE, Naming, Rows, beside, family, grouped, on, precision
from moejax.study.report.page import Block, Fold, text
from moejax.study.report.quantities import rounded
from moejax.study.report.results import Row
from moejax.study.report.svg import embed

NOT_LAYERS = ("embed", "loss", "head_dequant", "optimizer", "other", "idle")
BACKWARD = "backward with recomputation"
MOE_WHOLE = "moe (time-weighted)"


@dataclass(frozen=True)
class _Kind:
    """An experiment of seconds by scope."""

    experiment: str
    colors: Mapping[str, str]
    counted: Callable[[str], bool]  # whether a scope is part of the whole that shares are of
    whole: str
    theirs: Callable[[step_bars.Bars], Mapping[str, float]]
    title: str


STAGES = _Kind("stages", figures.PHASES, lambda s: s != "idle", "the step's busy time", lambda b: b.phases, "A step by phase")
LAYERS = _Kind(
    "layers", figures.LAYERS, lambda s: s not in NOT_LAYERS, "the layers' time", lambda b: b.layers, "A step's layers by kind"
)
KERNELS = _Kind("kernels", figures.KERNELS, lambda s: True, "the mixture of experts' time", lambda b: b.kernels, "The MoE by kernel")


def scope_name(scope: str) -> str:
    return {"moe": "MoE", "layers": "rest of the layers"}.get(scope, scope.removeprefix("moe/").replace("_", " "))


def kernel_name(scope: str) -> str:
    return "rest of the MoE" if scope == "moe" else scope_name(scope)


def study_settings(model_family: str) -> list[tuple[str, int, step_bars.Bars]]:
    """(routing, batch, bars) of the study's settings: dense before sparse, by batch."""
    table = reference.stage_seconds()
    found = []
    for routing in ("dense", "sparse"):
        sizes = [r.batch for r in table.rows if (r.model, r.kind) == (model_family, routing) and r.batch is not None]
        found += [(routing, size, bars) for size, bars in zip(sizes, step_bars.study(model_family, routing), strict=True)]
    return found


def _study_roles(model_family: str) -> list[tuple[str, int, str, step_bars.Bars]]:
    """(routing, batch, what that batch size stands for, bars) of the study's settings."""
    settings = study_settings(model_family)
    sizes: dict[str, list[float]] = {}
    for routing, batch, _ in settings:
        sizes.setdefault(routing, []).append(batch)
    return [(routing, batch, role(batch, routing, sizes), bars) for routing, batch, bars in settings]


def seconds(sources: Sequence[Source], rows: Rows, kind: _Kind) -> tuple[Block, ...]:
    """The figures and the table of an experiment of seconds by scope."""
    naming, name = Naming(rows), kernel_name if kind is KERNELS else scope_name
    grid = Grid(sources, "seconds, and share")
    blocks: list[Block] = []
    for setting, mine in grouped(rows, naming.name).items():
        by_source = {source: [r for s, r in mine if s is source] for source in sources}
        drawn = [_ours(grid, source, own, setting, kind, name) for source, own in by_source.items() if own]
        if model_family := family(sources, mine[0][1].model):
            drawn.append(_theirs(grid, model_family, setting, kind, name))
        figure = figures.shares(drawn, kind.colors, name, f"share of {kind.whole}, %")
        title = f"{kind.title}: {setting}. Shares of {kind.whole}; its length stands at a bar's end."
        title += beside(sources, mine[:1], " Below: the study's PyTorch, ") + precision(sources)
        blocks.append(embed(figure, f"{kind.experiment}-{len(blocks) + 1}", title, _told(drawn, kind, name)))
    caption = f"Seconds of a step by scope, and their share of {kind.whole}. {naming.constant()}".strip()
    return (*blocks, grid.folded(caption, "these figures"))


def _ours(grid: Grid, source: Source, rows: list[Row], setting: str, kind: _Kind, name: Callable[[str], str]) -> figures.Bars:
    sizes, bars = batches(rows), []
    settings = sorted({(r.routing or "", r.batch or 0) for r in rows})
    for routing, batch in settings:
        own = {r.scope: r for r in rows if (r.routing or "", r.batch or 0) == (routing, batch)}
        counted = {scope: float(r.value) for scope, r in own.items() if kind.counted(scope)}
        whole = sum(counted.values())
        group = f"{setting}, {routing}, {role(batch, routing, sizes)}"
        grid.put(group, "batch, queries", source, text(f"{batch:g}"))
        for scope in _ordered(own, kind.colors):
            cell = text(source.number(own[scope]))
            if scope in counted and whole:
                cell = (*cell, " · ", derived(counted[scope] / whole, "share"))
            grid.put(group, name(scope), source, cell)
        if kind is STAGES and "recompute" in counted and whole:
            both = counted["recompute"] + counted.get("backward", 0.0)
            grid.put(group, BACKWARD, source, (derived(both, "s"), " · ", derived(both / whole, "share")))
        bars.append(figures.Bar(f"{routing}, batch {batch:g}", counted, rounded(whole, "s")))
    return figures.Bars(f"{setting} on {source.label}", tuple(bars))


def _theirs(grid: Grid, model_family: str, setting: str, kind: _Kind, name: Callable[[str], str]) -> figures.Bars:
    bars = []
    for routing, batch, what, measured in _study_roles(model_family):
        parts = kind.theirs(measured)
        whole = sum(parts.values())
        group = f"{setting}, {routing}, {what}"
        grid.put(group, "batch, queries", None, text(f"{batch:g}"), REFERENCE[model_family])
        for scope in _ordered(parts, kind.colors):
            # The study's backward pass holds its recomputation.
            line = BACKWARD if (kind, scope) == (STAGES, "backward") else name(scope)
            grid.put(group, line, None, (published(parts[scope], "s"), " · ", derived(parts[scope] / whole, "share")))
        bars.append(figures.Bar(f"{routing}, batch {batch:g}", parts, rounded(whole, "s")))
    return figures.Bars(f"study (PyTorch, A40): {REFERENCE[model_family]}{', one layer' if kind is KERNELS else ''}", tuple(bars))


def _ordered(parts: Mapping[str, object], colors: Mapping[str, str]) -> list[str]:
    return [c for c in colors if c in parts] + [p for p in parts if p not in colors]


def _told(drawn: Sequence[figures.Bars], kind: _Kind, name: Callable[[str], str]) -> str:
    """The figure in words: the largest parts of every bar."""
    said = []
    for block in drawn:
        for bar in block.bars:
            whole = sum(bar.parts.values()) or 1.0
            largest = sorted(bar.parts.items(), key=lambda item: -item[1])[:3]
            parts = ", ".join(f"{name(k)} {100 * v / whole:.0f} %" for k, v in largest)
            said.append(f"{block.heading}, {bar.label}: {parts}.")
    return f"Stacked bars, shares of {kind.whole}. " + " ".join(said)


_PANELS = (
    ("compute_utilization", 0, "Figure 9: matrix units", "share of the peak matrix rate", "SM utilization"),
    ("memory_utilization", 1, "Figure 10: memory", "share of the peak bandwidth", "DRAM utilization"),
)


def utilization(sources: Sequence[Source], rows: Rows) -> tuple[Block, ...]:
    naming = Naming(rows)
    blocks: list[Block] = []
    grids = {metric: Grid(sources, "share") for metric, *_ in _PANELS}
    for setting, mine in grouped(rows, naming.name).items():
        model_family = family(sources, mine[0][1].model)
        panels = []
        for metric, index, title, meaning, _ in _PANELS:
            shown = _utilization_ours(sources, grids[metric], [(s, r) for s, r in mine if r.metric == metric], setting)
            shown += _utilization_theirs(grids[metric], model_family, setting, index) if model_family else []
            order = [k for k in (*figures.KERNELS, MOE_WHOLE) if any(k in d.values for d in shown)]
            panels.append((title, f"{meaning}, %", shown, order))
        other = " on an A40: Nsight Compute's utilization of SM and DRAM, which is not the same thing."
        theirs = beside(sources, mine[:1], " Hollow, the study's ", other)
        title = (
            f"How busy the device is in the kernels of the MoE: {setting}. Filled, ours: of the device's peak matrix rate (top) and "
            f"bandwidth (bottom).{precision(sources)}{theirs}"
        )
        description = f"Dots on one line per kernel for each setting; the table below has every value. {len(mine)} values of ours."
        blocks.append(embed(figures.dots(panels, kernel_name), f"utilization-{len(blocks) + 1}", title, description))
    studys = any(family(sources, r.model) for _, r in rows)
    tables = tuple(
        grids[metric].table(text(f"{title}: {ours}{f' (study: {theirs}, Nsight Compute)' if studys else ''}. {naming.constant()}"))
        for metric, _, title, ours, theirs in _PANELS
    )
    return (*blocks, Fold("The numbers of these figures", tables))


def _utilization_ours(sources: Sequence[Source], grid: Grid, rows: Rows, setting: str) -> list[figures.Dots]:
    shown = []
    for source in sources:
        own = [r for s, r in rows if s is source]
        sizes = batches(own)
        for routing, batch in sorted({(r.routing or "", r.batch or 0) for r in own}):
            what = role(batch, routing, sizes)
            group = f"{setting}, {routing}, {what}"
            grid.put(group, "batch, queries", source, text(f"{batch:g}"))
            here = {r.scope: r for r in own if (r.routing or "", r.batch or 0) == (routing, batch)}
            for scope in _ordered(here, figures.KERNELS):
                grid.put(group, kernel_name(scope), source, text(source.number(here[scope])))
            values = {scope: float(r.value) for scope, r in here.items()}
            label = f"{routing}, batch {batch:g}{on(sources, source)}"
            shown.append(figures.Dots(label, values, _shade(routing, what), figures.MARKERS[source.index % 5]))
    return shown


def _utilization_theirs(grid: Grid, model_family: str, setting: str, index: int) -> list[figures.Dots]:
    shown = []
    for routing, batch, what, bars in _study_roles(model_family):
        shares = {MOE_WHOLE if kernel == step_bars.ALL else kernel: pair[index] for kernel, pair in bars.utilization.items()}
        values = {kernel: share for kernel, share in shares.items() if share is not None}
        group = f"{setting}, {routing}, {what}"
        grid.put(group, "batch, queries", None, text(f"{batch:g}"), REFERENCE[model_family])
        for scope in _ordered(values, figures.KERNELS):
            grid.put(group, kernel_name(scope), None, text(published(values[scope], "share")))
        if what in (ONE, LARGEST):
            label = f"{REFERENCE[model_family]}, A40: {routing}, batch {batch:g}"
            shown.append(figures.Dots(label, values, _shade(routing, what), "s", hollow=True))
    return shown


def _shade(routing: str, what: str) -> str:
    """A routing's colour, lighter for what is smaller than the largest batch."""
    light = {("sparse", ONE): "#7cc3ec", ("dense", ONE): "#f0a673", ("sparse", DENSE): "#3d97cb"}
    return light.get((routing, what), figures.ROUTING.get(routing, figures.OTHER))

