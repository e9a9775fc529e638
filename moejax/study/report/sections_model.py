"""The cost model: equation 1 (Figure 13), equation 2 and the step model (Figures 14 and 15), dollars (Table IV)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from moejax.estimator import prices
from moejax.study import reference
from moejax.study.cost import paper
from moejax.study.report import figures
from moejax.study.report.compare import Source
from moejax.study.report.grid import STUDY, Grid, derived, published
from moejax.study.report.naming import REFERENCE, Naming, Rows, beside, dataset, family, grouped, on, precision, rows_of
from moejax.study.report.page import Block, Figure, Group, Number, Table, Text, text
from moejax.study.report.quantities import digits
from moejax.study.report.results import Row
from moejax.study.report.svg import embed


def fit_batch(sources: Sequence[Source], rows: Rows) -> tuple[Block, ...]:
    proved = rows_of(sources, "largest_batch", "proved_batch")
    naming, grid = Naming([*rows, *proved], ("model", "data")), Grid(sources, "equation 1")
    theirs = reference.max_batch_figure()
    fitted = [(s, r) for s, r in rows if r.metric in _EQUATION_1]
    for source, row in fitted:
        number = source.number(row)
        if row.metric == "c1":  # a share, and not said in percent, as the study has it
            number = replace(number, text=digits(row.value))
        grid.put(f"{naming.name(row)}: coefficients", _EQUATION_1[row.metric], source, text(number))
    for name, mine in grouped(fitted, naming.name).items():
        model, group = family(sources, mine[-1][1].model), f"{name}: coefficients"
        if model is None:
            continue
        for index, metric in enumerate(("c0", "c1")):
            cell: Text = (published(theirs.printed[model][index]),)
            if model in theirs.artifact:
                cell = (*cell, " (drawn with ", published(theirs.artifact[model][index]), ")")
            grid.put(group, _EQUATION_1[metric], None, cell, REFERENCE[model])
        grid.put(group, _EQUATION_1["model_gb"], None, text(published(theirs.model_gb[model], "GB")))
    predicted = [(s, r) for s, r in rows if r.metric == "predicted_batch"]
    for source, row in (*predicted, *proved):
        what = f"{row.scope or 'here'}, by equation 1" if row.experiment == "fit_batch" else "here, as it ran"
        grid.put(f"{naming.name(row)}: the largest batch", f"{row.routing}, {what}", source, text(source.number(row)))
    if any(family(sources, r.model) for _, r in rows):
        gpus = {int(name.rsplit("-", 1)[1].removesuffix("GB")): name for name in reference.raw()["fig13_max_batch"]["ground_truth"]}
        for gb, batch in theirs.ground_truth.items():
            grid.put(_STUDY_13, f"{gb} GB, as it ran ({gpus[gb]})", None, text(published(batch)))
        for gb, batch in theirs.printed_projection.items():
            grid.put(_STUDY_13, f"{gb} GB, by equation 1", None, text(published(batch)))
    blocks = (_batch_figure(sources, naming, predicted, proved, theirs),) if predicted else ()
    caption = (
        "Equation 1: batch = C0·(GPU memory - model) / (tokens·((1 - C1) + C1·k/E)), C0 in tokens/GB, GB of 1e9 bytes; \"here\": within "
        f"this sweep's memory limit. {naming.constant()}"
    )
    return (*blocks, grid.folded(caption))


_STUDY_13 = "study: Mixtral-8x7B, sparse, by GPU memory"
_EQUATION_1 = {"c0": "C0", "c1": "C1", "model_gb": "model", "rmse_gb": "RMSE", "points": "points"}


def _batch_figure(sources: Sequence[Source], naming: Naming, predicted: Rows, proved: Rows, theirs: reference.Equation1) -> Figure:
    panels = []
    for setting, mine in grouped(predicted, naming.name).items():
        lines = []
        for source in sources:
            limit = source.study.memory_limit.bytes or source.study.environment.memory_bytes
            after = on(sources, source)
            for routing, color in figures.ROUTING.items():
                own = [r for s, r in mine if (s, r.routing) == (source, routing)]
                ran = [r for s, r in proved if (s, naming.name(r), r.routing) == (source, setting, routing)]
                points = [(gb, float(r.value)) for r in own if (gb := _gigabytes(r.scope)) is not None]
                if points:
                    lines.append(figures.Line(f"{routing}: equation 1{after}", tuple(sorted(points)), color, "None", "--"))
                if ran and limit:
                    at = tuple((limit / 1e9, float(r.value)) for r in ran)
                    lines.append(figures.Line(f"{routing}: ran{after}", at, color, figures.MARKERS[source.index % 5], ""))
        if lines:
            panels.append(figures.Panel(setting, tuple(lines), "memory, GB", "largest batch"))
    title = "The largest batch by memory: as it ran (dots) and by equation 1 (dashes)."
    if any(family(sources, r.model) for _, r in predicted):
        ran_there, said_there = (
            tuple((float(gb), float(batch)) for gb, batch in known.items()) for known in (theirs.ground_truth, theirs.printed_projection)
        )
        lines = [
            figures.Line("Mixtral-8x7B (study): ran", ran_there, figures.ROUTING["sparse"], "s", "", hollow=True),
            figures.Line("Mixtral-8x7B (study): equation 1, printed", said_there, figures.ROUTING["sparse"], "x", ":"),
        ]
        panels.append(figures.Panel(_STUDY_13, tuple(lines), "memory, GB", "largest batch"))
        title += (
            " Last: the study's PyTorch, Mixtral-8x7B on an A100 of 40 GB, an A40 and an H100 of 80 GB, and by equation 1 for 100 and "
            "120 GB."
        )
    told = "; ".join(
        f"{p.title}, {line.label}: " + ", ".join(f"{y:g} at {x:.3g} GB" for x, y in line.points) for p in panels for line in p.lines
    )
    return embed(figures.curves(panels, height=1.8, whole=False), "fit_batch-1", title, told)


def _gigabytes(scope: str) -> float | None:
    match = re.fullmatch(r"([\d.e+-]+) GB", scope)
    return float(match[1]) if match else None


_WORDS = {"equation 2 (printed)": "equation 2 as printed", "equation 2 (fitted)": "equation 2 as fitted", "moejax": "moejax's step model"}


def fit_throughput(sources: Sequence[Source], rows: Rows) -> tuple[Block, ...]:
    naming, grid = Naming(rows, ("model", "data")), Grid(sources, "")
    measured = rows_of(sources, "throughput", "queries_per_second")
    panels = []
    for scope, mine in grouped([(s, r) for s, r in rows if r.metric != "predicted"], lambda r: r.scope).items():
        for source, row in mine:
            grid.put(f"{naming.name(row)}: {_WORDS.get(scope, scope)}", _fitted(row.metric), source, text(source.number(row)))
    predicted = [(s, r) for s, r in rows if r.metric == "predicted"]
    for setting, mine in grouped(predicted, naming.name).items():
        curve = _curve(sources, mine[0][1])
        if curve:
            same = dataset(mine[0][1].data)[1]
            _study_fits(grid, setting if same else f"study: {REFERENCE[curve.model]}, commonsense", curve, same)
        for scope, of_scope in grouped(mine, lambda r: r.scope).items():
            for source, row in of_scope:
                what = f"{setting}: queries a second by {_WORDS.get(scope, scope)}"
                packed = " (packed)" if row.batching == "pack" else ""
                grid.put(what, f"{row.routing}, batch {row.batch:g}{packed}", source, text(source.number(row)))
        if lines := _fit_lines(sources, mine, measured):
            panels.append(figures.Panel(setting, tuple(lines), "batch, queries", "queries a second"))
        if curve:
            panels.append(_study_panel(curve))
    blocks: list[Block] = []
    if panels:
        title = (
            "Measured throughput (dots), moejax's step model (lines) and equation 2 as the study fitted it (dashes)."
            + beside(sources, predicted, " The study's panels: PyTorch, ", " on an A40, fitted anew to its measurements.")
            + precision(sources)
        )
        told = "Dots and lines by batch size. " + "; ".join(
            f"{p.title}, {line.label}: {line.points[-1][1]:.3g} at batch {line.points[-1][0]:g}" for p in panels for line in p.lines
        )
        blocks.append(embed(figures.curves(panels, height=1.9), "fit_throughput-1", title, told))
    return (*blocks, grid.folded(
        "Equation 2 as printed: C2·ln(batch / (k/E·C3)) + C4; as the study's figures were fitted: C2·ln(batch^(1 / (k/E·C3))) + C4, with a "
        "fixed C3. moejax's step model: seconds = t0 + tokens·(u + v·k/E). RMSE over all measured points."
    ))  # fmt: skip


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
    here = [(s, r) for s, r in measured if (r.model, r.data) == (first.model, first.data)]
    for source in sources:
        for routing, color in figures.ROUTING.items():
            for name, rows, marker, dash in (
                ("measured", here, figures.MARKERS[source.index % 5], ""),
                ("step model", [(s, r) for s, r in mine if r.scope == "moejax"], "None", "-"),
                ("equation 2", [(s, r) for s, r in mine if r.scope == "equation 2 (fitted)"], "None", "--"),
            ):
                own = [r for s, r in rows if (s, r.routing) == (source, routing) and r.batching != "pack"]
                if own:
                    points = tuple(sorted((float(r.batch or 0), float(r.value)) for r in own))
                    lines.append(figures.Line(f"{routing}: {name}{on(sources, source)}", points, color, marker, dash))
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


def cost(sources: Sequence[Source], rows: Rows) -> tuple[Block, ...]:
    naming, groups = Naming(rows, ("model", "method", "data", "batching")), []
    for setting, mine in grouped(rows, lambda r: naming.name(r, r.routing or "")).items():
        lines: list[tuple[Text, ...]] = []
        for gpu, here in grouped(mine, lambda r: r.scope).items():
            for source in sources:
                own = {r.metric: source.number(r) for s, r in here if s is source}
                if own:
                    name = f"{gpu} ({source.label})" if len(sources) > 1 else gpu
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
    return (replace(number, text="measured" if float(number.exact) else "carried over"),)
