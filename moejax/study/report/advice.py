"""What to do with a model, by what was measured: the top of the page."""

from __future__ import annotations

from collections.abc import Sequence

from moejax.study.report.compare import Source
from moejax.study.report.naming import said
from moejax.study.report.page import Block, Number, Paragraph, Text, text
from moejax.study.report.results import Row


def paragraphs(sources: Sequence[Source]) -> tuple[Block, ...]:
    """One for each model and data set of a folder: the fastest measured batch, and where the whole run costs least and takes least."""
    blocks: list[Block] = []
    for source in sources:
        where = f" on {source.label}" if len(sources) > 1 else ""
        rates = [r for r in source.study.of("throughput", metric="queries_per_second") if r.batch is not None]
        for model, data in dict.fromkeys((r.model, r.data) for r in rates):
            best = max((r for r in rates if (r.model, r.data) == (model, data)), key=lambda r: r.value)
            how = ", ".join(said(key, value) for key in ("routing", "batching") if (value := getattr(best, key)) not in (None, "fixed"))
            named = ", ".join(filter(None, (model, said("method", best.method), said("data", data) if data else "")))
            batch = Number(f"{best.batch:g}", repr(best.batch), "derived")
            rate = (source.number(best), " queries/s, the fastest measured.")
            fastest = text(f"{named}: train{where} with a batch of ", batch, f" queries ({how}): ", *rate)
            costs = [r for r in source.study.of("cost", model=model, data=data, routing=best.routing) if r.metric in ("hours", "usd")]
            blocks.append(Paragraph((*fastest, *_run(source, costs))))
    return tuple(blocks)


def _run(source: Source, costs: list[Row]) -> Text:
    """Of the config's whole run: the least dollars and the least hours, each with its card and whether it was measured there."""
    words: dict[str, list[str]] = {}  # a card's name -> what the run is there
    for metric, word in (("usd", "cheapest"), ("hours", "fastest")):
        least = min((r for r in costs if r.metric == metric), key=lambda r: r.value, default=None)
        if least is not None:
            words.setdefault(least.scope, []).append(word)
    answers: list[Text] = []
    for card, found in words.items():
        there = sorted((r for r in costs if r.scope == card), key=lambda r: (r.metric == "usd") != (found[0] == "cheapest"))
        measured = any(r.scope == card and r.value for r in source.study.of("cost", metric="measured", model=there[0].model))
        first, *second = (text(source.number(r), *(() if r.metric == "usd" else (" hours",))) for r in there)  # dollars have their sign
        both = (*first, *(part for more in second for part in (" and ", *more)))
        ends = "." if measured else " (carried over, not measured there)."
        answers.append(text(f" The whole run is {' and '.join(found)} on {card}: ", *both, ends))
    return tuple(part for answer in answers for part in answer)
