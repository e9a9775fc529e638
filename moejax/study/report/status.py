"""What of a sweep is there, what is not and why; and where it ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from moejax.study.report import compare
from moejax.study.report.compare import Source
from moejax.study.report.page import Block, Code, Commands, Fold, Group, Items, Link, Paragraph, Table, Text, text
from moejax.study.report.quantities import rounded
from moejax.study.report.results import Row, Trial

_WORDS = {"done": "done", "failed": "failed", "out_of_memory": "out of memory", "pending": "has not run"}
MISSING = Trial("pending", None, "planned, and not among the trials", "")


def trials(source: Source) -> dict[str, tuple[str, Trial]]:
    """Trial -> (experiment, what became of it), in the order of the plan; one that was planned and is not there: pending."""
    study = source.study
    experiments = {r.trial: r.experiment for r in study.rows} | {p.trial: p.experiment for p in study.plan}
    found = {p.trial: (p.experiment, study.trials.get(p.trial, MISSING)) for p in study.plan}
    return found | {name: (experiments.get(name, ""), t) for name, t in study.trials.items() if name not in found}


def unfinished(sources: Sequence[Source]) -> tuple[Block, ...]:
    """A warning for every folder whose sweep is not whole."""
    blocks: list[Block] = []
    for source in sources:
        counts = Counter(t.status for _, t in trials(source).values())
        words = _WORDS | {"pending": "have not run"}
        parts = [f"{counts[s]} {words[s]}" for s in ("pending", "failed", "out_of_memory") if counts[s]]
        if not parts and source.study.finished:
            continue
        where = f"{source.label}: " if len(sources) > 1 else ""
        told = "This sweep is not finished" if not source.study.finished else "Not every trial has a result"
        counted = f": of {sum(counts.values())} trials {', '.join(parts)}" if parts else ""
        fragments = text(f"{where}{told}{counted} (", Link("which, and why", "trials"), ").")
        if not source.study.finished:
            fragments = (*fragments, " To go on: ", Code(source.study.command))
        blocks.append(Paragraph(fragments, warning=True))
    return tuple(blocks)


# A trial may measure more than the experiment that it is planned as (one of a length, where that is the breakdown's).
_BREAKDOWN = ("stages", "layers", "kernels", "utilization")
_ALSO = {"stages": _BREAKDOWN, "length": _BREAKDOWN, "fit_throughput": ("fit_batch",)}


def of(source: Source, experiment: str) -> dict[str, Trial]:
    """The trials that gave values of an experiment, or should have."""
    gave = {r.trial for r in source.study.of(experiment)}
    found = trials(source).items()
    own = {name for name, (kind, _) in found if name in gave or kind == experiment}
    at = source.study.config.get("sizes", {}).get("breakdown_tokens")
    owed = {
        name
        for name, (kind, t) in found
        if t.status != "done" and experiment in _ALSO.get(kind, ()) and (kind != "length" or name.endswith(f"/{at}"))
    }
    return {name: t for name, (_, t) in found if name in own or name in owed}


def gaps(sources: Sequence[Source], experiment: str) -> tuple[Block, ...]:
    """Which trials of an experiment have no result."""
    items: list[Text] = []
    for source in sources:
        where = f"{source.label}: " if len(sources) > 1 else ""
        for name, trial in of(source, experiment).items():
            if trial.status != "done":
                why = f": {trial.message}" if trial.message else ""
                items.append(text(where, Code(name), f" {_WORDS[trial.status]}{why}"))
    if not items:
        return ()
    shown: tuple[Block, ...] = (Items(tuple(items)),)
    return shown if len(items) <= 3 else (Fold(f"{len(items)} trials without a result", shown),)


def commands(sources: Sequence[Source], experiment: str) -> tuple[Block, ...]:
    """What made the numbers of an experiment."""
    lines = []
    for source in sources:
        own = list(dict.fromkeys(t.command for t in of(source, experiment).values() if t.command))
        if own and len(sources) > 1:
            lines.append(f"# {source.label}")
        lines += own
    return (Fold("The commands", (Commands(tuple(lines)),)),) if lines else ()


def does_not_fit(sources: Sequence[Source]) -> tuple[Block, ...]:
    """For every setting of which not one query fits: what would."""
    blocks: list[Block] = []
    for source in sources:
        setting: dict[tuple[object, ...], list[Row]] = {}
        for row in source.study.of("largest_batch"):
            setting.setdefault((row.model, row.routing, row.data, row.batching), []).append(row)
        for (model, routing, data, _), rows in setting.items():
            would = [r for r in rows if r.metric.startswith("would_fit")]
            ran = any(r.metric == "proved_batch" and r.value >= 1 for r in rows)
            if would and not ran:
                blocks.append(Paragraph(_would(source, f"{model}, {routing}, {data}", would), warning=True))
    return tuple(blocks)


def _would(source: Source, setting: str, rows: Sequence[Row]) -> Text:
    parts: list[Text] = []
    for row in rows:
        number = source.number(row)
        if row.metric == "would_fit_batch":
            parts.append(text("on ", row.scope or "a larger GPU", " ", number, " would" if row.value == 1 else " queries would"))
        elif row.metric == "would_fit_seq_len":
            parts.append(text("here one of ", number, " tokens would"))
        else:
            parts.append(text(row.metric.replace("_", " "), " ", number))
    joined: Text = ()
    for part in parts:
        joined = (*joined, *("; " if joined else ""), *part)
    limit = source.study.memory_limit
    within = f" within the artificial limit of {rounded(limit.bytes or 0, 'B')}" if limit.artificial else ""
    return text(f"{setting}: not one query fits on {source.label}{within}. By the closed form: ", *joined, ".")


def trial_tables(sources: Sequence[Source]) -> tuple[Block, ...]:
    blocks: list[Block] = []
    for source in sources:
        rows: list[tuple[Text, ...]] = []
        expected = {p.trial: p.expected_seconds for p in source.study.plan}
        for name, (experiment, trial) in trials(source).items():
            took = rounded(trial.seconds, "s") if trial.seconds is not None else "–"
            planned = rounded(expected[name], "s") if name in expected else "–"
            what = (experiment, _WORDS[trial.status], planned, took, trial.message or "")
            rows.append((text(Code(name)), *(text(w) for w in what)))
        table = Table(
            text(f"Trials of {source.label}, in the order of the plan."), ("trial", "experiment", "status", "expected", "took", "message"),
            (Group((), tuple(rows)),),
        )  # fmt: skip
        blocks.append(Fold(f"All {len(rows)} trials of {source.label}", (table,)))
    return tuple(blocks)


def environment(sources: Sequence[Source]) -> tuple[Block, ...]:
    """The environments side by side; what differs comes first."""
    columns = [dict(_environment(s)) for s in sources]
    if len(sources) > 1:  # of the settings, what differs
        flat = [dict(compare.flat(s.study.config)) for s in sources]
        for key in dict.fromkeys(k for f in flat for k in f):
            if len({repr(f.get(key)) for f in flat}) > 1:
                for column, found in zip(columns, flat, strict=True):
                    column[f"setting {key}"] = str(found.get(key))
    names = list(dict.fromkeys(k for c in columns for k in c))
    differing = [n for n in names if len({c.get(n) for c in columns}) > 1]
    same = [n for n in names if n not in differing]
    groups = []
    for title, lines in (("differs", differing), ("the same", same)):
        if lines:
            rows = tuple((text(n), *(text(c.get(n) or "–") for c in columns)) for n in lines)
            groups.append(Group(text(title) if len(sources) > 1 and differing else (), rows))
    table = Table(text("Where and with what it ran."), ("", *(s.label for s in sources)), tuple(groups))
    settings = tuple(
        Fold(f"The settings of {s.label}", (Commands(tuple(f"{k}: {v}" for k, v in compare.flat(s.study.config))),)) for s in sources
    )
    return (table, *settings)


def _environment(source: Source) -> Iterator[tuple[str, str | None]]:
    study, it = source.study, source.study.environment
    limit = study.memory_limit
    yield "device", it.device
    yield "memory", rounded(it.memory_bytes, "B") if it.memory_bytes else "not said by the device"
    if limit.bytes is not None:
        yield "memory limit of a step", f"{rounded(limit.bytes, 'B')}{' (artificial: --memory-limit)' if limit.artificial else ''}"
    yield f"peak matrix rate, {it.peaks}", f"{it.peak_flops / 1e12:.3g} TFLOP/s" if it.peak_flops else None
    yield f"peak bandwidth, {it.peaks}", f"{it.peak_bytes_per_second / 1e9:.3g} GB/s" if it.peak_bytes_per_second else None
    yield "CPU", it.cpu
    yield from it.versions.items()
    yield "commit", it.git_commit
    yield "preset", study.preset
    yield "models", "; ".join(f"{m.name} ({m.method}, weights: {m.weights})" for m in study.models)
    yield "command", study.command
    yield "made (UTC)", study.created
    yield "environment's fingerprint", it.fingerprint
    yield "configuration's hash", study.config_hash
