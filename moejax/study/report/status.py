"""What of a sweep is there, what is not and why; and where it ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from moejax.study.report import compare
from moejax.study.report.compare import Source
from moejax.study.report.page import Block, Code, Group, Paragraph, Table, Text, text
from moejax.study.report.quantities import rounded
from moejax.study.report.results import Trial

_WORDS = {"done": "done", "failed": "failed", "out_of_memory": "out of memory", "pending": "has not run"}
MISSING = Trial("pending", None, "planned, and not among the trials", "")


def trials(source: Source) -> dict[str, Trial]:
    """What became of each trial, in the order of the plan; one that was planned and is not there: pending."""
    study = source.study
    return {p.trial: study.trials.get(p.trial, MISSING) for p in study.plan} | study.trials


def unfinished(sources: Sequence[Source]) -> tuple[Block, ...]:
    """A warning for every folder whose sweep is not whole."""
    blocks: list[Block] = []
    for source in sources:
        counts = Counter(t.status for t in trials(source).values())
        words = _WORDS | {"pending": "have not run"}
        parts = [f"{counts[s]} {words[s]}" for s in ("pending", "failed", "out_of_memory") if counts[s]]
        if not parts and source.study.finished:
            continue
        where = f"{source.label}: " if len(sources) > 1 else ""
        told = "This sweep is not finished" if not source.study.finished else "Not every trial has a result"
        counted = f": of {sum(counts.values())} trials {', '.join(parts)}" if parts else ""
        fragments = text(f"{where}{told}{counted} (which, and why: at the end).")
        if not source.study.finished:
            fragments = (*fragments, " To go on: ", Code(source.study.command))
        blocks.append(Paragraph(fragments, warning=True))
    return tuple(blocks)


def without_result(sources: Sequence[Source]) -> tuple[Block, ...]:
    """How many trials gave a result, and each that did not."""
    blocks: list[Block] = []
    for source in sources:
        found = trials(source)
        rows = tuple(
            (text(Code(name)), text(_WORDS[t.status]), text(t.message or "")) for name, t in found.items() if t.status != "done"
        )
        took = rounded(sum(t.seconds or 0.0 for t in found.values()), "s")
        told = f"{source.label}: {len(found) - len(rows)} of {len(found)} trials gave a result in {took}."
        blocks.append(Table(told, ("trial", "status", "message"), (Group("", rows),)) if rows else Paragraph(text(told)))
    return tuple(blocks)


def artificial_limit(source: Source) -> str:
    """That what fits is not what the device could hold; "" where it is."""
    limit = source.study.memory_limit
    told = f"On {source.label} a step was held to {rounded(limit.bytes or 0, 'B')}: an artificial limit (--memory-limit), not the device's."
    return told if limit.artificial else ""


def environment(sources: Sequence[Source]) -> tuple[Block, ...]:
    """The environments, of several side by side: then what differs comes first, settings included."""
    columns: list[dict[str, str | None]] = [dict(_environment(s)) for s in sources]
    settings = [dict(compare.flat(s.study.config)) for s in sources]
    for key in dict.fromkeys(k for found in settings for k in found):
        if len({repr(found.get(key)) for found in settings}) > 1:
            for column, found in zip(columns, settings, strict=True):
                column[f"setting {key}"] = str(found.get(key))
    names = list(dict.fromkeys(k for c in columns for k in c))
    differing = [n for n in names if len({c.get(n) for c in columns}) > 1]
    groups = []
    for title, lines in (("differs", differing), ("the same" if differing else "", [n for n in names if n not in differing])):
        rows: list[tuple[Text, ...]] = [(text(n), *(text(c.get(n) or "–") for c in columns)) for n in lines]
        groups += [Group(title, tuple(rows))] if rows else []
    return (Table("Where and with what it ran.", ("", *(s.label for s in sources)), tuple(groups)),)


def _environment(source: Source) -> Iterator[tuple[str, str | None]]:
    study, it = source.study, source.study.environment
    limit = study.memory_limit
    yield "device", it.device
    yield "memory", rounded(it.memory_bytes, "B") if it.memory_bytes else "not said by the device"
    if limit.bytes is not None:
        yield "memory limit of a step", f"{rounded(limit.bytes, 'B')}{' (artificial: --memory-limit)' if limit.artificial else ''}"
    yield f"peak matrix rate, {it.peaks}", f"{it.peak_flops / 1e12:.3g} TFLOP/s" if it.peak_flops else None
    yield f"peak bandwidth, {it.peaks}", f"{it.peak_bytes_per_second / 1e9:.3g} GB/s" if it.peak_bytes_per_second else None
    trained = [s["experiment"]["training"] for s in study.config.get("settings", {}).values()]
    yield "precision", "; ".join(dict.fromkeys(f"{t['compute_dtype']}, trained weights in {t['param_dtype']}" for t in trained))
    yield "CPU", it.cpu
    yield from it.versions.items()
    yield "commit", it.git_commit
    yield "preset", study.preset
    yield "models", "; ".join(f"{m.name} ({m.method}, weights: {m.weights})" for m in study.models)
    yield "prices of", "; ".join(f"{gpu}: {told}" for gpu, told in study.prices.items())
    yield "command", study.command
    yield "made (UTC)", study.created
