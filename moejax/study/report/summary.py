"""Five sentences computed from the results: what ran, what fits, how fast, where the time goes, what the models are worth."""

from __future__ import annotations

from collections.abc import Sequence

from moejax.profiling import bars
from moejax.study import reference
from moejax.study.report.compare import Source
from moejax.study.report.grid import derived, published
from moejax.study.report.naming import DATASET, REFERENCE, family, said
from moejax.study.report.page import Number, Text, text
from moejax.study.report.quantities import rounded
from moejax.study.report.results import Row
from moejax.study.report.sections_time import NOT_LAYERS, study_settings
from moejax.study.report.status import trials

UNKNOWN = "not measured"


def sentences(sources: Sequence[Source]) -> tuple[Text, ...]:
    """Always five; what was not measured is said to be so. Where several are compared: of one data set a model, without the study's."""
    brief = len(sources) > 1
    found = []
    for part in (_ran, _fits, _fast, _where, _models):
        begin, contents = "", []
        for source in sources:
            begin, content = part(source, brief)
            contents.append(text(f"on {source.label} ", *content) if brief and part is not _ran else content)
        found.append(_capital((begin, *_join(contents, "; ", "."))))
    return tuple(found)


Said = tuple[str, Text]
"""How a sentence begins, the same for every folder, and how it goes on."""


def _capital(content: Text) -> Text:
    words = tuple(f for f in content if f)
    first = words[0]
    return (first[0].upper() + first[1:], *words[1:]) if isinstance(first, str) else words


def _join(parts: Sequence[Text], between: str, end: str = "") -> Text:
    joined: Text = ()
    for part in parts:
        joined = (*joined, *((between,) if joined else ()), *part)
    return (*joined, end) if end else joined


def _ran(source: Source, brief: bool) -> Said:
    all_trials = [t for _, t in trials(source).values()]
    done = sum(t.status == "done" for t in all_trials)
    seconds = sum(t.seconds or 0.0 for t in all_trials)
    environment = source.study.environment
    memory = f" with {rounded(environment.memory_bytes, 'B')}" if environment.memory_bytes else ""
    models = ", ".join(f"{m.name} ({said('method', m.method)})" for m in source.study.models)
    return "", text(
        f"on {environment.device}{memory}, {done} of {len(all_trials)} trials gave a result in {rounded(seconds, 's')}, with {models}, "
        f"jax {environment.versions.get('jax', 'of an unknown version')}"
    )


def _settings(rows: Sequence[Row], brief: bool) -> list[tuple[str, str | None]]:
    """(model, data) of rows; brief: one data set of each model."""
    found = list(dict.fromkeys((r.model, r.data) for r in rows))
    return [pair for pair in found if not brief or pair == next(p for p in found if p[0] == pair[0])]


def _fits(source: Source, brief: bool) -> Said:
    rows = source.study.of("largest_batch", metric="proved_batch")
    begin = "the largest batch that ran, in queries, is "
    if not rows:
        return begin, text(UNKNOWN)
    printed = {(m.model, m.dataset, m.kind): m.printed for m in reference.max_batches()}
    parts = []
    for model, data in _settings(rows, brief):
        own = [r for r in rows if (r.model, r.data) == (model, data)]
        numbers = _join([text(source.number(r), f" {r.routing}") for r in own], ", ")
        theirs = [
            text(published(found), f" {r.routing}")
            for r in own
            if not brief and (found := printed.get((family([source], model) or "", DATASET.get(data or "", ""), r.routing or "")))
        ]
        beside = ((f" ({_study(source, model)}: ",), *(_join(theirs, ", "),), (")",)) if theirs else ()
        parts.append((*text(f"{model} on {said('data', data)} "), *numbers, *(f for t in beside for f in t)))
    limit = source.study.memory_limit
    held = f", all within an artificial memory limit of {rounded(limit.bytes or 0, 'B')}, not the device's" if limit.artificial else ""
    return begin, ("for ", *_join(parts, ", for " if brief else "; for "), held)


def _study(source: Source, model: str) -> str:
    """Whose number stands in brackets behind a model's."""
    known = family([source], model)
    return f"study's {REFERENCE[known]} on an A40" if known else ""


def _fast(source: Source, brief: bool) -> Said:
    rows = [r for r in source.study.of("throughput", metric="queries_per_second") if r.batching != "pack"]
    begin = "the highest throughput of padded batches, in queries a second, is "
    if not rows:
        return begin, text(UNKNOWN)
    parts = []
    for model, data in _settings(rows, brief):
        best = _best([r for r in rows if (r.model, r.data) == (model, data)])
        said_rates = _join([text(source.number(r), f" {k} (batch {r.batch:g})") for k, r in best.items()], " and ")
        part: Text = (*text(f"{model} on {said('data', data)} "), *said_rates)
        if len(best) == 2:
            part = (*part, ", ", derived(best["sparse"].value / best["dense"].value), " times as many")
            theirs = None if brief else _study_ratio(source, model, data)
            part = (*part, *((f" ({_study(source, model)}: ", theirs, ")") if theirs else ()))
        packed = [r for r in source.study.of("throughput", metric="queries_per_second", model=model, data=data) if r.batching == "pack"]
        if packed and not brief:
            part = (*part, ", and packed ", *_join([text(source.number(r), f" {k}") for k, r in _best(packed).items()], " and "))
        parts.append(part)
    return begin, ("for ", *_join(parts, ", for " if brief else "; for "))


def _best(rows: Sequence[Row]) -> dict[str, Row]:
    """Routing -> the row of the largest value."""
    return {k: max(own, key=lambda r: r.value) for k in ("sparse", "dense") if (own := [r for r in rows if r.routing == k])}


def _study_ratio(source: Source, model: str, data: str | None) -> Number | None:
    for curve in reference.curves():
        if (curve.gpu, curve.model, curve.dataset) == ("a40", family([source], model), DATASET.get(data or "")):
            best = {k: max(q for _, q in curve.kind(k)) for k in ("sparse", "dense")}
            return derived(best["sparse"] / best["dense"])
    return None


def _where(source: Source, brief: bool) -> Said:
    begin, parts = "at the largest sparse batch that was profiled, the mixture of experts takes ", []
    for model in dict.fromkeys(r.model for r in source.study.of("layers", metric="seconds")):
        rows = source.study.of("layers", metric="seconds", model=model, routing="sparse")
        if not rows:
            continue
        batch = max(r.batch or 0 for r in rows)
        layers = {r.scope: float(r.value) for r in rows if r.batch == batch}
        stages = _of(source.study.of("stages", metric="seconds", model=model, routing="sparse"), batch)
        shares = bars.takeaways(bars.Bars("", {k: v for k, v in stages.items() if k != "idle"}, layers, {}))
        moe, step = sum(v for k, v in layers.items() if k not in NOT_LAYERS), shares["optimizer, of the step"]
        theirs, known = {}, None if brief else family([source], model)
        if known:
            largest = max((s for s in study_settings(known) if s[0] == "sparse"), key=lambda s: s[1])
            theirs = bars.takeaways(largest[2])
        part: Text = text(derived(layers.get("moe", 0.0) / moe, "share"), f" of {model}'s layers' time")
        if theirs:
            part = (*part, f" ({_study(source, model)}: ", derived(theirs["MoE, of the layers' time"] or 0.0, "share"), ")")
        if step is not None:
            part = (*part, ", the optimizer ", derived(step, "share"), " of the step")
            if theirs:
                part = (*part, " (there: ", derived(theirs["optimizer, of the step"] or 0.0, "share"), ")")
        parts.append(part)
    return begin, _join(parts, "; ") if parts else text("a share that was ", UNKNOWN)


def _of(rows: Sequence[Row], batch: float) -> dict[str, float]:
    return {r.scope: float(r.value) for r in rows if r.batch == batch}


def _models(source: Source, brief: bool) -> Said:
    errors = source.study.of("fit_throughput", metric="mean_error", scope="moejax")
    costs = source.study.of("cost", metric="usd")
    begin, parts = "the model of a step's seconds misses the measured ones ", []
    if errors:
        low, high = min(errors, key=lambda r: r.value), max(errors, key=lambda r: r.value)
        span = text(source.number(low)) if low is high else text(source.number(low), " to ", source.number(high))
        parts.append(("by ", *span, " on average"))
    else:
        parts.append(text("by an amount that was ", UNKNOWN))
    for model in dict.fromkeys(r.model for r in costs):
        cheapest = min((r for r in costs if r.model == model), key=lambda r: r.value)
        setting = ", ".join(s for s in (cheapest.routing or "", said("data", cheapest.data) if cheapest.data else "") if s)
        parts.append(text(f"fine-tuning {model} ({setting}) costs least on {cheapest.scope}: ", source.number(cheapest)))
    if not costs:
        parts.append(text("no price is known for this device"))
    elif not brief and any(family([source], r.model) == reference.COSTED for r in costs):
        row = min(reference.cost_table(), key=lambda r: r.usd)
        parts.append(text(f"the study's {REFERENCE[reference.COSTED]} on {row.gpu}: ", published(row.usd, "$")))
    return begin, _join(parts, ", " if brief else "; ")
