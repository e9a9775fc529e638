"""What fits and how fast it goes: Table III, Figure 8, the lengths, and how the work falls on the experts (Figure 11)."""

from __future__ import annotations

from collections.abc import Sequence

from moejax.study import reference
from moejax.study.report import figures
from moejax.study.report.compare import Source
from moejax.study.report.grid import Grid, derived, published
from moejax.study.report.naming import DATASET, REFERENCE, Naming, Rows, beside, dataset, family, grouped, on, precision, said
from moejax.study.report.page import Block, Fold, Text, text
from moejax.study.report.quantities import rounded
from moejax.study.report.results import Row
from moejax.study.report.svg import embed

_MEMORY = {
    "predicted_batch": "predicted by the compiler",
    "failed_batch": "did not run",
    "peak_bytes": "peak memory of the largest",
    "memory_limit": "memory limit",
    "would_fit_batch": "would fit",
    "would_fit_seq_len": "would fit here, tokens a query",
}


def largest_batch(sources: Sequence[Source], rows: Rows) -> tuple[Block, ...]:
    naming = Naming(rows, ("model", "method", "data", "seq_len"))
    grid, more = Grid(sources, "queries"), Grid(sources, "", None)
    printed = {(m.model, m.dataset, m.kind): m for m in reference.max_batches()}
    missing = set(printed)
    for source, row in rows:
        setting, routing = naming.name(row), row.routing or ""
        if row.metric == "proved_batch":
            grid.put(setting, routing, source, text(source.number(row)))
        model, (theirs, same) = family(sources, row.model), dataset(row.data)
        if model and same and (model, theirs, routing) in missing:
            missing.remove((model, theirs, routing))
            grid.put(setting, routing, None, _printed(printed[model, theirs, routing]), REFERENCE[model])
    elsewhere = (family(sources, r.model) for _, r in rows if not dataset(r.data)[1])
    for known in dict.fromkeys(model for model in elsewhere if model):
        for routing in ("sparse", "dense"):  # of other data: apart
            grid.put(f"study: {REFERENCE[known]}, commonsense", routing, None, _printed(printed[known, DATASET["cs"], routing]))
    for metric, words in _MEMORY.items():
        for source, row in rows:
            if row.metric == metric:
                where = f" ({row.scope})" if row.scope else ""
                more.put(naming.name(row, row.routing or ""), f"{words}{where}", source, text(source.number(row)))
    caption = " ".join(("The largest batch that ran, in queries.", *map(artificial_limit, sources), naming.constant()))
    blocks: tuple[Block, ...] = (grid.table(text(caption)),) if grid.cells else ()
    return (*blocks, Fold("Predicted, refused, and the memory", (more.table(text("By the compiler and as it ran.")),)))


def artificial_limit(source: Source) -> str:
    """That what fits is not what the device could hold; "" where it is."""
    limit = source.study.memory_limit
    told = f"On {source.label} a step was held to {rounded(limit.bytes or 0, 'B')}: an artificial limit (--memory-limit), not the device's."
    return told if limit.artificial else ""


def _printed(found: reference.MaxBatch) -> Text:
    cell: Text = (published(found.printed),)
    return cell if found.swept == found.printed else (*cell, " (in its sweeps: ", published(found.swept), ")")


def throughput(sources: Sequence[Source], rows: Rows) -> tuple[Block, ...]:
    naming, grid = Naming(rows, ("model", "method", "data")), Grid(sources, "queries a second")
    panels = []
    several = len({r.batching for _, r in rows}) > 1
    for setting, mine in grouped(rows, naming.name).items():
        lines = []
        for source in sources:
            for routing in ("sparse", "dense", None):
                for batching in ("pad_longest", "fixed", "pack", None):
                    own = sorted((r for s, r in mine if (s, r.routing, r.batching) == (source, routing, batching)), key=_batch)
                    if not own:
                        continue
                    how = said("batching", batching) if batching else ""
                    for row in own:
                        packed = f" ({how})" if batching and several else ""
                        group = ", ".join(w for w in (setting, routing) if w)
                        grid.put(group, f"batch {row.batch:g}{packed}", source, text(source.number(row)))
                    label = ", ".join(w for w in (routing, how, source.label if len(sources) > 1 else "") if w)
                    marker = (figures.PACKED_MARKERS if batching == "pack" else figures.MARKERS)[source.index % 5]
                    color = figures.ROUTING.get(routing or "", figures.OTHER)
                    points = tuple(sorted((_batch(r), float(r.value)) for r in own))
                    lines.append(figures.Line(label, points, color, marker, "--" if batching == "pack" else "-"))
        lines += _study_curves(sources, grid, mine[0][1], setting)
        panels.append(figures.Panel(setting, tuple(lines), "batch, queries", "queries a second"))
    theirs = beside(sources, rows, " Filled: ours; hollow: the study's PyTorch, ")
    title = f"Throughput by batch size.{theirs}{precision(sources)}"
    return (
        embed(figures.curves(panels), "throughput-1", title, _told(panels)),
        grid.folded(f"Queries a second by batch size. {naming.constant()}"),
    )


def _batch(row: Row) -> float:
    return float(row.batch or 0)


def _study_curves(sources: Sequence[Source], grid: Grid, row: Row, setting: str) -> list[figures.Line]:
    model, (data, same) = family(sources, row.model), dataset(row.data)
    lines: list[figures.Line] = []
    if model is None:
        return lines
    for curve in reference.curves():
        if (curve.gpu, curve.model, curve.dataset) != ("a40", model, data):
            continue
        for routing in ("sparse", "dense"):
            group = f"{setting if same else f'study: {REFERENCE[model]}, commonsense'}, {routing}"
            for batch, rate in curve.kind(routing):
                line = f"batch {batch}"
                padded = next((name for name in grid.cells.get(group, {}) if name.startswith(f"{line} (padded")), line)
                grid.cells.setdefault(group, {}).setdefault(padded, {})[len(sources)] = text(published(rate, "queries/s"))
                if same:
                    grid.beside[group] = REFERENCE[model]
            points = tuple((float(b), q) for b, q in curve.kind(routing))
            words = f"{REFERENCE[model]}, A40{'' if same else ', commonsense'}"
            lines.append(figures.Line(f"{words}: {routing}", points, figures.ROUTING[routing], "s", ":", hollow=True))
    return lines


def _told(panels: Sequence[figures.Panel]) -> str:
    """Lines in words: where each begins and ends."""
    said = []
    for panel in panels:
        for line in panel.lines:
            (x0, y0), (x1, y1) = line.points[0], line.points[-1]
            said.append(f"{panel.title}, {line.label}: {y0:.3g} at {x0:g}" + (f", {y1:.3g} at {x1:g}." if x1 != x0 else "."))
    return f"Lines, {panels[0].ylabel} over {panels[0].xlabel}. " + " ".join(said)


# A metric in words, and the study's quantity beside it with its unit.
_LENGTH = {
    "step_seconds": ("seconds a step", "latency_seconds", "s"),
    "compute_utilization": ("matrix units", "sm_percent", "%"),
    "memory_utilization": ("memory bandwidth", "dram_percent", "%"),
}


def length(sources: Sequence[Source], rows: Rows) -> tuple[Block, ...]:
    rows = [(s, r) for s, r in rows if r.scope in ("", "moe (time-weighted)")]
    if not rows:
        return ()
    naming, grid = Naming(rows, ("model", "method", "data", "batching")), Grid(sources, "tokens a query")
    panels = []
    for setting, mine in grouped(rows, naming.name).items():
        lines, model = [], family(sources, mine[0][1].model)
        for source in sources:
            for routing in ("sparse", "dense"):
                for metric, (words, *_) in _LENGTH.items():
                    own = sorted((r for s, r in mine if (s, r.routing, r.metric) == (source, routing, metric)), key=_tokens)
                    for row in own:
                        batch = f" (batch {row.batch:g})" if row.batch is not None else ""
                        grid.put(f"{setting}, {routing}: {words}", f"{row.seq_len}", source, text(source.number(row), batch))
                    if metric == "step_seconds" and own:
                        points = tuple((_tokens(r), float(r.value)) for r in own)
                        marker = figures.MARKERS[source.index % 5]
                        lines.append(figures.Line(f"{routing}{on(sources, source)}", points, figures.ROUTING[routing], marker))
        for known, routing in ((model, routing) for routing in ("sparse", "dense") if model):
            for words, quantity, unit in _LENGTH.values():
                values = reference.sequence_length_sensitivity(quantity).row(known, routing).values  # type: ignore[arg-type]
                for tokens, value in values.items():
                    grid.put(f"{setting}, {routing}: {words}", tokens, None, text(published(value, unit)), REFERENCE[known])
                if unit == "s":
                    points = tuple((float(t), float(v)) for t, v in values.items())
                    label = f"{REFERENCE[known]}, A40: {routing}"
                    lines.append(figures.Line(label, points, figures.ROUTING[routing], "s", ":", hollow=True))
        if lines:
            panels.append(figures.Panel(setting, tuple(lines), "tokens a query", "seconds a step"))
    for group, by_length in grid.cells.items():  # shortest first, whoever measured it
        grid.cells[group] = dict(sorted(by_length.items(), key=lambda item: int(item[0])))
    theirs = beside(sources, rows, " Hollow: the study's PyTorch, ", " on an A40, at the largest batch of each length.")
    title = f"A step's time by length: as many rows as hold the tokens of the largest batch.{theirs}{precision(sources)}"
    busy = "ours of the peaks; the study's SM and DRAM utilization" if theirs else "of the peaks"
    caption = (
        "Step time by length (in brackets: the step's rows), and how busy the device is in the MoE, weighted by time "
        f"({busy}). {naming.constant()}"
    )
    return embed(figures.curves(panels, xlog=True), "length-1", title, _told(panels)), grid.folded(caption)


def _tokens(row: Row) -> float:
    return float(row.seq_len or 0)


_STUDY_LOAD = {"cs": "HE", "math": "GS", "problems": "GS"}
_STUDY_SET = {"HE": "HellaSwag", "GS": "GSM8K"}
_WHEN = {"before": "before fine-tuning", "after": "after fine-tuning"}


def expert_load(sources: Sequence[Source], rows: Rows) -> tuple[Block, ...]:
    naming, grid = Naming(rows), Grid(sources, "tokens per query")
    panels: list[tuple[str, Sequence[str], dict[str, list[float]]]] = []
    counts, variances = reference.tokens_per_expert(), reference.printed_variance()
    drawn: set[tuple[str, str]] = set()
    one_routing = len({r.routing for _, r in rows}) == 1
    for setting, mine in grouped(rows, lambda r: naming.name(r, r.routing or "")).items():
        first = mine[0][1]
        key = (family(sources, first.model) or "", _STUDY_LOAD.get(first.data or "", ""))
        for when, words in _WHEN.items():
            group = f"{setting}, {words}"
            for source, row in mine:
                before, _, expert = row.scope.partition("/")
                if before == when and row.metric == "tokens_per_query":
                    grid.put(group, f"expert {expert}", source, text(source.number(row)))
            theirs = (key[0], key[1] + ("_tuned" if when == "after" else ""))
            for number, tokens in enumerate(counts.get(theirs, ())):
                content = text(published(tokens, "tokens/query"))
                grid.put(group, f"expert {number}", None, content, f"{REFERENCE[key[0]]} on {_STUDY_SET[key[1]]}")
            for source, row in mine:
                if row.scope == when:
                    grid.put(group, row.metric.replace("_", " "), source, text(source.number(row)))
            if theirs in counts:
                largest = max(counts[theirs]) / sum(counts[theirs])
                grid.put(group, "variance", None, text(published(variances[theirs], "(tokens/query)^2")))
                grid.put(group, "largest share", None, text(derived(largest, "share")))
        for source in sources:
            series = {w: found for w in _WHEN if (found := _shares([r for s, r in mine if s is source], w))}
            if series:
                title = naming.name(first, "" if one_routing else first.routing or "")
                where = f"\n{source.label}" if len(sources) > 1 else ""
                panels.append((f"{title}{where}", [str(i) for i in range(max(map(len, series.values())))], series))
        if key in counts and key not in drawn:
            drawn.add(key)
            series = {w: _percent(counts[key[0], key[1] + t]) for w, t in (("before", ""), ("after", "_tuned"))}
            panels.append((f"study: {REFERENCE[key[0]]}, {_STUDY_SET[key[1]]}", [str(i) for i in range(8)], series))
    theirs_ = beside(sources, rows, " The study's: PyTorch, ", ".")
    title = f"Each expert's share of all choices, mean over the layers, before and after fine-tuning.{theirs_}"
    told = " ".join(
        f"{name.replace(chr(10), ' on ')}: " + "; ".join(f"{w} {_said(v)}" for w, v in series.items()) + "." for name, _, series in panels
    )
    figure = figures.grouped(panels, figures.BEFORE_AFTER, "expert", "share, %")
    return (
        embed(figure, "expert_load-1", title, f"Bars by expert, percent. {told}"),
        grid.folded(f"Tokens per query by expert, mean over the layers. {naming.constant()}"),
    )


def _shares(rows: Sequence[Row], when: str) -> list[float]:
    found = {int(r.scope.split("/")[1]): 100 * float(r.value) for r in rows if r.metric == "share" and r.scope.startswith(f"{when}/")}
    return [found[expert] for expert in sorted(found)]


def _percent(counts: Sequence[float]) -> list[float]:
    return [100 * c / sum(counts) for c in counts]


def _said(values: Sequence[float]) -> str:
    return ", ".join(f"{v:.1f}" for v in values)
