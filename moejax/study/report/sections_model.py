"""The cost model: equation 1 (Figure 13), equation 2 and the step model (Figures 14 and 15), dollars (Table IV)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from moejax.estimator import prices
from moejax.study import reference
from moejax.study.cost import paper
from moejax.study.report import figures
from moejax.study.report.compare import Source
from moejax.study.report.grid import STUDY, Grid, derived, published
from moejax.study.report.naming import REFERENCE, Naming, beside, dataset, family, precision, rows_of
from moejax.study.report.page import Block, Figure, Fold, Group, Number, Table, Text, text
from moejax.study.report.quantities import digits
from moejax.study.report.results import Row
from moejax.study.report.svg import embed

_EQUATION_1 = ("c0", "c1", "model_gb", "rmse_gb", "points")


def fit_batch(sources: Sequence[Source]) -> tuple[Block, ...]:
    rows = rows_of(sources, "fit_batch")
    if not rows:
        return ()
    proved = [(s, r) for s, r in rows_of(sources, "largest_batch") if r.metric == "proved_batch"]
    naming, grid = Naming([r for _, r in (*rows, *proved)], ("model", "data")), Grid(sources, "equation 1")
    theirs = reference.max_batch_figure()
    gpus = {int(name.rsplit("-", 1)[1].removesuffix("GB")): name for name in reference.raw()["fig13_max_batch"]["ground_truth"]}
    for source, row in rows:
        if row.metric in _EQUATION_1:
            number = source.number(row)  # C1 is a share and not said in percent, as the study has it
            plain = Number(digits(row.value), number.exact, number.source, number.place) if row.metric == "c1" else number
            grid.put(f"{naming.name(row)}: coefficients", _coefficient(row.metric), source, text(plain))
    for name, row in {naming.name(r): r for _, r in rows if r.metric in _EQUATION_1}.items():
        model = family(sources, row.model)
        if model is None:
            continue
        for index, coefficient in enumerate(("c0", "c1")):
            cell: Text = (published(theirs.printed[model][index]),)
            if model in theirs.artifact:
                cell = (*cell, " (drawn with ", published(theirs.artifact[model][index]), ")")
            grid.put(f"{name}: coefficients", _coefficient(coefficient), None, cell, REFERENCE[model])
        grid.put(f"{name}: coefficients", _coefficient("model_gb"), None, text(published(theirs.model_gb[model], "GB")))
    predicted = [(s, r) for s, r in rows if r.metric == "predicted_batch"]
    for source, row in predicted:
        group = f"{naming.name(row)}: the largest batch"
        grid.put(group, f"{row.routing}, {row.scope or 'here'}, by equation 1", source, text(source.number(row)))
    for source, row in proved:
        grid.put(f"{naming.name(row)}: the largest batch", f"{row.routing}, here, as it ran", source, text(source.number(row)))
    if any(family(sources, r.model) for _, r in rows):
        for gb, batch in theirs.ground_truth.items():
            grid.put(_STUDY_13, f"{gb} GB, as it ran ({gpus[gb]})", None, text(published(batch)))
        for gb, batch in theirs.printed_projection.items():
            grid.put(_STUDY_13, f"{gb} GB, by equation 1", None, text(published(batch)))
    blocks = (_batch_figure(sources, naming, predicted, proved, theirs),) if predicted else ()
    caption = (
        "Equation 1: batch = C0·(GPU memory - model) / (tokens·((1 - C1) + C1·k/E)), C0 in tokens/GB, GB of 1e9 bytes; \"here\": within "
        f"this sweep's memory limit. {naming.constant()}"
    )
    return (*blocks, Fold("The numbers of this figure", (grid.table(text(caption)),)))


_STUDY_13 = "study: Mixtral-8x7B, sparse, by GPU memory"
_COEFFICIENTS = {"c0": "C0", "c1": "C1", "model_gb": "model", "rmse_gb": "RMSE", "points": "points"}


def _coefficient(metric: str) -> str:
    return _COEFFICIENTS.get(metric, metric)


Rows = list[tuple[Source, Row]]


def _batch_figure(sources: Sequence[Source], naming: Naming, predicted: Rows, proved: Rows, theirs: reference.Equation1) -> Figure:
    panels = []
    for setting in dict.fromkeys(naming.name(r) for _, r in predicted):
        lines = []
        for source in sources:
            limit = source.study.memory_limit.bytes or source.study.environment.memory_bytes
            for routing, color in figures.ROUTING.items():
                own = [r for s, r in predicted if s is source and (naming.name(r), r.routing) == (setting, routing)]
                proven = [r for s, r in proved if s is source and (naming.name(r), r.routing) == (setting, routing)]
                after = f", {source.label}" if len(sources) > 1 else ""
                points = [(gb, float(r.value)) for r in own if (gb := _gigabytes(r.scope)) is not None]
                if points:
                    lines.append(figures.Line(f"{routing}: equation 1{after}", tuple(sorted(points)), color, "None", "--"))
                if proven and limit:
                    at = tuple((limit / 1e9, float(r.value)) for r in proven)
                    lines.append(figures.Line(f"{routing}: ran{after}", at, color, figures.MARKERS[source.index % 5], ""))
        if lines:
            panels.append(figures.Panel(setting, tuple(lines), "memory, GB", "largest batch"))
    title = "The largest batch by memory: as it ran (dots) and by equation 1 (dashes)."
    if any(family(sources, r.model) for _, r in predicted):
        ran_there = tuple((float(gb), float(b)) for gb, b in theirs.ground_truth.items())
        said_there = tuple((float(gb), float(b)) for gb, b in theirs.printed_projection.items())
        ran = figures.Line("Mixtral-8x7B (study): ran", ran_there, figures.ROUTING["sparse"], "s", "", hollow=True)
        said = figures.Line("Mixtral-8x7B (study): equation 1, printed", said_there, figures.ROUTING["sparse"], "x", ":")
        panels.append(figures.Panel(_STUDY_13, (ran, said), "memory, GB", "largest batch"))
        title += (
            " Last: the study's PyTorch, Mixtral-8x7B on an A100 of 40 GB, an A40 and an H100 of 80 GB, and by equation 1 for 100 and "
            "120 GB."
        )
    told = "; ".join(
        f"{p.title}, {line.label}: " + ", ".join(f"{y:g} at {x:.3g} GB" for x, y in line.points) for p in panels for line in p.lines
    )
    figure = figures.curves(panels, height=1.8, whole=False)
    return Figure("fit_batch-1", title, embed(figure, "fit_batch-1", title, told))


def _gigabytes(scope: str) -> float | None:
    match = re.fullmatch(r"([\d.e+-]+) GB", scope)
    return float(match[1]) if match else None


_WORDS = {"equation 2 (printed)": "equation 2 as printed", "equation 2 (fitted)": "equation 2 as fitted", "moejax": "moejax's step model"}


def fit_throughput(sources: Sequence[Source]) -> tuple[Block, ...]:
    rows = rows_of(sources, "fit_throughput")
    if not rows:
        return ()
    naming, grid = Naming((r for _, r in rows), ("model", "data")), Grid(sources, "")
    measured = [(s, r) for s, r in rows_of(sources, "throughput") if r.metric == "queries_per_second"]
    panels = []
    for scope in dict.fromkeys(r.scope for _, r in rows):
        for source, row in rows:
            if row.scope == scope and row.metric != "predicted":
                grid.put(f"{naming.name(row)}: {_WORDS.get(scope, scope)}", _fitted(row.metric), source, text(source.number(row)))
    predicted = [(s, r) for s, r in rows if r.metric == "predicted"]
    for setting in dict.fromkeys(naming.name(r) for _, r in predicted):
        mine = [(s, r) for s, r in predicted if naming.name(r) == setting]
        curve = _curve(sources, mine[0][1])
        if curve:
            same = dataset(mine[0][1].data)[1]
            _study_fits(grid, setting if same else f"study: {REFERENCE[curve.model]}, commonsense", curve, same)
        for scope in dict.fromkeys(r.scope for _, r in mine):
            for source, row in mine:
                if row.scope == scope:
                    what = f"{setting}: queries a second by {_WORDS.get(scope, scope)}"
                    packed = " (packed)" if row.batching == "pack" else ""
                    grid.put(what, f"{row.routing}, batch {row.batch:g}{packed}", source, text(source.number(row)))
        lines = _fit_lines(sources, mine, measured)
        if lines:
            panels.append(figures.Panel(setting, tuple(lines), "batch, queries", "queries a second"))
        if curve:
            panels.append(_study_panel(curve))
    blocks: list[Block] = []
    if panels:
        title = (
            "Measured throughput (dots), moejax's step model (lines) and equation 2 as the study fitted it (dashes)."
            + beside(sources, (r for _, r in predicted), " The study's panels: PyTorch, ", " on an A40, fitted anew to its measurements.")
            + precision(sources)
        )
        told = "Dots and lines by batch size. " + "; ".join(
            f"{p.title}, {line.label}: {line.points[-1][1]:.3g} at batch {line.points[-1][0]:g}" for p in panels for line in p.lines
        )
        blocks.append(Figure("fit_throughput-1", title, embed(figures.curves(panels, height=1.9), "fit_throughput-1", title, told)))
    caption = (
        "Equation 2 as printed: C2·ln(batch / (k/E·C3)) + C4; as the study's figures were fitted: C2·ln(batch^(1 / (k/E·C3))) + C4, with a "
        "fixed C3. "
        "moejax's step model: seconds = t0 + tokens·(u + v·k/E). RMSE over all measured points."
    )
    return (*blocks, Fold("The numbers of this figure", (grid.table(text(caption)),)))


_FITTED = {
    "c2": "C2, queries/s", "c3": "C3", "c4": "C4, queries/s", "rmse": "RMSE, queries/s", "t0_seconds": "t0", "points": "points",
    "token_seconds": "u, per token", "expert_token_seconds": "v, per token through all experts",
    "mean_error": "mean error, of the step's seconds",
}  # fmt: skip


def _fitted(metric: str) -> str:
    return _FITTED.get(metric, metric.replace("_", " "))


def _curve(sources: Sequence[Source], row: Row) -> reference.Curve | None:
    key = ("a40", family(sources, row.model), dataset(row.data)[0])  # the study had no model of another family
    return next((c for c in reference.curves() if (c.gpu, c.model, c.dataset) == key), None)


def _study_fits(grid: Grid, setting: str, curve: reference.Curve, same: bool) -> None:
    forms: tuple[tuple[paper.Form, str], ...] = (("printed", "equation 2 (printed)"), ("fitted", "equation 2 (fitted)"))
    for form, scope in forms:
        fit, group = paper.fit_curve(curve, form), f"{setting}: {_WORDS[scope]}"
        if same:
            grid.beside[group] = REFERENCE[curve.model]
        for name, value in (("c2", fit.c2), ("c3", fit.c3), ("c4", fit.c4), ("rmse", paper.rmse(curve, fit))):
            unit = "" if name == "c3" else "queries/s"
            cell: Text = (published(value, unit) if name == "c3" else derived(value, unit),)
            if (form, name) == ("fitted", "rmse"):
                cell = (*cell, " (printed: ", published(curve.printed_rmse), ")")
            grid.cells.setdefault(group, {}).setdefault(_fitted(name), {})[len(grid.sources)] = cell


def _fit_lines(sources: Sequence[Source], mine: Rows, measured: Rows) -> list[figures.Line]:
    lines = []
    first = mine[0][1]
    for source in sources:
        after = f", {source.label}" if len(sources) > 1 else ""
        for routing, color in figures.ROUTING.items():
            own = [
                (float(r.batch or 0), float(r.value))
                for s, r in measured
                if s is source and (r.model, r.data, r.routing) == (first.model, first.data, routing) and r.batching != "pack"
            ]
            if own:
                marker = figures.MARKERS[source.index % 5]
                lines.append(figures.Line(f"{routing}: measured{after}", tuple(sorted(own)), color, marker, ""))
            for scope, dash in (("moejax", "-"), ("equation 2 (fitted)", "--")):
                said = [
                    (float(r.batch or 0), float(r.value))
                    for s, r in mine
                    if s is source and (r.scope, r.routing) == (scope, routing) and r.batching != "pack"
                ]
                if said:
                    name = "step model" if scope == "moejax" else "equation 2"
                    lines.append(figures.Line(f"{routing}: {name}{after}", tuple(sorted(said)), color, "None", dash))
    return lines


def _study_panel(curve: reference.Curve) -> figures.Panel:
    import numpy as np

    fit, lines = paper.fit_curve(curve, "fitted"), []
    for routing, color in figures.ROUTING.items():
        points = tuple((float(b), q) for b, q in curve.kind(routing))
        xs = np.array([b for b, _ in points])
        share = reference.EXPERTS_PER_TOKEN[routing] / reference.EXPERTS
        said = tuple(zip(xs.tolist(), fit.throughput(xs, np.full_like(xs, share)).tolist(), strict=True))
        lines.append(figures.Line(f"{REFERENCE[curve.model]} (study), {routing}: measured", points, color, "s", "", hollow=True))
        lines.append(figures.Line(f"{routing}: equation 2", said, color, "None", "--"))
    return figures.Panel(f"study: {REFERENCE[curve.model]}, {curve.dataset}, A40", tuple(lines), "batch, queries", "queries a second")


_COST = {
    "queries": "queries", "batch": "batch", "queries_per_second": "queries/s", "hours": "hours", "usd": "$", "usd_per_hour": "$/hour",
    "price": "price of", "measured": "here",
}  # fmt: skip


def cost(sources: Sequence[Source]) -> tuple[Block, ...]:
    rows = rows_of(sources, "cost")
    if not rows:
        return ()
    naming, groups = Naming((r for _, r in rows), ("model", "method", "data", "batching")), []
    several = len(sources) > 1
    for setting in dict.fromkeys(naming.name(r, r.routing or "") for _, r in rows):
        mine = [(s, r) for s, r in rows if naming.name(r, r.routing or "") == setting]
        lines: list[tuple[Text, ...]] = []
        for gpu in dict.fromkeys(r.scope for _, r in mine):
            for source in sources:
                own = {r.metric: source.number(r) for s, r in mine if s is source and r.scope == gpu}
                if own:
                    name = f"{gpu} ({source.label})" if several else gpu
                    seller = text(source.study.prices.get(gpu, "–"))
                    lines.append((text(name), *(seller if m == "price" else _cost_cell(own.get(m), m) for m in _COST)))
        groups.append(Group(text(setting), tuple(lines)))
    table_4 = tuple(
        (
            text(r.gpu), text("–"), text(published(r.max_batch)), text(published(r.queries_per_second)),
            text(derived(r.usd / r.usd_per_hour)), text(published(r.usd, "$")), text(published(r.usd_per_hour)),
            text(next(p for p in prices.STUDY if p.usd_per_hour == r.usd_per_hour).told.partition(", ")[2]), text("–"),
        )
        for r in reference.cost_table()
    )  # fmt: skip
    if any(family(sources, r.model) for _, r in rows):
        groups.append(Group(text(f"{STUDY.replace(', A40', '')}, Mixtral-8x7B, sparse (Table IV)"), table_4))
    caption = (
        "Hours and dollars of the config's whole run (so many queries, all epochs together) at the fastest measured batch. \"here\": "
        "measured on this device, or carried over from it by the GPUs' data sheets. "
        f"{naming.constant()}"
    )
    return (Table(text(caption), ("GPU", *_COST.values()), tuple(groups)),)


def _cost_cell(number: Number | None, metric: str) -> Text:
    if number is None:
        return ("–",)
    if metric != "measured":
        return (number,)
    words = "measured" if float(number.exact) else "carried over"
    return (Number(words, number.exact, number.source, number.place),)
