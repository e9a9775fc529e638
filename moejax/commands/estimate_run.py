"""A run in seconds, hours and dollars by card, of one software: what `predict` and `plan` answer unless they are asked for the study's."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from moejax import __version__
from moejax.commands.estimate_asked import Asked, asked
from moejax.commands.tables import draw, print_json, said_once, show_table
from moejax.errors import UserError
from moejax.estimator import links, prices, workload
from moejax.estimator.memory import DoesNotFit, refusals
from moejax.estimator.tools.forecast import Forecast
from moejax.estimator.units import counted, told
from moejax.estimator.workload import Workload

SOFTWARE = {
    "moejax": "moejax (this program)", "unsloth": "unsloth, by published receipts of it (moejax estimate receipts)",
    "e4b": "e4b (experts4bit-qlora), by published receipts of it (moejax estimate receipts)",
}  # fmt: skip


def predict(options: argparse.Namespace) -> int:
    given = asked(options)
    found, left_out = _all(given)
    if not found:
        raise UserError("; ".join(map(str, left_out.values())))
    if options.json:
        print_json(_facts(given, found) | {"left_out": {gpu: str(why) for gpu, why in left_out.items()}})
        return 0
    show(given, found, [f"left out: {why}" for why in left_out.values()])
    return 0


def plan(options: argparse.Namespace) -> int:
    for name in ("budget", "deadline"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UserError(f"{name} = {value:g}: expected more than 0")
    given = asked(options)
    found, left_out = _all(given)
    if not found:
        raise UserError("; ".join(refusals(left_out)))
    found.sort(key=lambda pair: (pair[0].usd is None, pair[0].usd or 0.0, pair[0].hours))
    answers = _answers([p for p, _ in found], options.budget, options.deadline)
    title = f"{found[0][1].experiment.name} by {given.forecasts.tool} (grey: never measured on that card)"
    draw(options.plot, lambda figures, folder: figures.options(folder, title, [p for p, _ in found]))
    every = [p for p, _ in found]
    answered = {n: _least(n, every) if p is None else f"{p.named}{_never(p)}: {_hours(p)}, {_usd(p)}" for n, p in answers.items()}
    if options.html is not None:
        _page(options.html, given, found, answered, refusals(left_out))
    if options.json:
        chosen = {name: None if p is None else p.on for name, p in answers.items()}
        print_json(_facts(given, found) | {"answers": chosen, "left_out": {gpu: why.brief for gpu, why in left_out.items()}})
        return 0
    show(given, found, [f"left out: {why}" for why in refusals(left_out)])
    for name, answer in answered.items():
        print(f"{name}: {answer}")
    return 0


def _page(
    file: str, given: Asked, found: Sequence[tuple[Forecast, Workload]], answers: dict[str, str], left_out: Sequence[str]
) -> None:  # fmt: skip
    from moejax.estimator.tools import page

    software = f"Times are those of {SOFTWARE[given.forecasts.tool]}."
    made = f"moejax {__version__}, {datetime.date.today().isoformat()}: moejax estimate plan --html"
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        page.write(
            Path(file), title_of(found), software, [p for p, _ in found], answers, left_out, [*given.notes, *assumed(given, found)], made,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"--html {file}: {error.strerror}: expected a file that can be written, e.g. plan.html") from None
    print(f"written: {file}", file=sys.stderr)


def _answers(found: Iterable[Forecast], budget: float | None, deadline: float | None) -> dict[str, Forecast | None]:
    priced = [p for p in found if p.usd is not None]
    answers = {"cheapest": min(priced, key=_dollars, default=None), "fastest": min(priced, key=lambda p: p.hours, default=None)}
    if budget is not None:
        affordable = [p for p in priced if _dollars(p) <= budget]
        answers[f"fastest under {budget:,.10g} USD"] = min(affordable, key=lambda p: p.hours, default=None)
    if deadline is not None:
        answers[f"cheapest within {deadline:,.10g} h"] = min((p for p in priced if p.hours <= deadline), key=_dollars, default=None)
    return answers


def _least(answer: str, found: Sequence[Forecast]) -> str:
    """Where no card with a price answers: what the nearest one needs."""
    priced = [p for p in found if p.usd is not None]
    if not priced:
        return "none: no price is known of a card on which it fits (--prices FILE brings one)"
    p = min(priced, key=_dollars if "USD" in answer else lambda p: p.hours)
    return f"none; the nearest needs {_hours(p)}, {_usd(p)}: {p.named}{_never(p)}"


def _dollars(p: Forecast) -> float:
    return p.usd or 0.0


def _all(given: Asked) -> tuple[list[tuple[Forecast, Workload]], dict[str, DoesNotFit]]:
    found, left_out = [], {}
    for gpu, n in given.cards:
        try:
            found.append(given.of(gpu, n))
        except DoesNotFit as error:
            left_out[links.several(gpu.name, n)] = error
    return found, left_out


def _facts(given: Asked, found: Sequence[tuple[Forecast, Workload]]) -> dict[str, Any]:
    tool = given.forecasts.tool
    _, job = found[0]
    run = {
        "queries": job.queries, "epochs": job.epochs, "mean_tokens": job.mean_tokens, "accumulation": job.accumulation,
        "download_gb": job.download_bytes / 1e9, "lengths": job.lengths.source,
    }  # fmt: skip
    predictions = [dataclasses.asdict(p) | {"rows": w.rows} for p, w in found]
    return {"tool": tool, "software": SOFTWARE[tool], "level": 0.9, "job": run, "predictions": predictions, "notes": list(given.notes)}


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _between(value: float, ends: tuple[float, float]) -> str:
    return f"{_number(value)} ({_number(ends[0])} to {_number(ends[1])})"


def _hours(p: Forecast) -> str:
    return f"{_between(p.hours, p.hours_interval)} h"


def _usd(p: Forecast) -> str:
    if p.usd is None or p.usd_interval is None or p.price is None:
        return "no price known"
    return f"{_between(p.usd, p.usd_interval)} USD at {p.price.told}{prices.aged(p.price)}"


def _never(p: Forecast) -> str:
    return "" if p.measured else " (never measured on this card)"


def show(given: Asked, found: Sequence[tuple[Forecast, Workload]], left_out: Sequence[str]) -> None:
    """Whose software, the table, and what holds of its rows."""
    print(f"Times are those of {SOFTWARE[given.forecasts.tool]}")
    cells = [
        (
            p.named, f"{w.rows} x {w.accumulation}", _between(p.step_seconds, p.step_seconds_interval), round(p.tokens_per_second),
            _between(p.hours, p.hours_interval), "-" if p.usd is None or p.usd_interval is None else _between(p.usd, p.usd_interval),
            p.memory, "no price known" if p.price is None else p.price.told + prices.aged(p.price),
        )
        for p, w in found
    ]  # fmt: skip
    columns = ("GPU", "rows", "s/step", "tokens/s", "hours", "USD", "memory", "price")
    show_table(title_of(found), columns, cells, [*given.notes, *assumed(given, found), *left_out])


def title_of(found: Sequence[tuple[Forecast, Workload]]) -> str:
    job = found[0][1]
    queries = counted(job.queries, "query", "queries")
    return f"{job.experiment.name}: {queries} of {job.mean_tokens:.0f} tokens x {counted(job.epochs, 'epoch')}"


def _download(w: Workload) -> str:
    """What is fetched before the first hour."""
    if not w.fetched:
        return "nothing to download"
    seconds = w.download_bytes / workload.LINE
    takes = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(1, round(seconds))} s"
    return f"before that a download of {told(w.download_bytes)} ({takes} at 1 Gbit/s), which stays on disk"


def assumed(given: Asked, found: Sequence[tuple[Forecast, Workload]]) -> list[str]:
    """What the figures rest on."""
    tool, (first, w) = given.forecasts.tool, found[0]
    ending = ["In brackets: 90 % intervals of a measured run"]
    if not all(p.measured for p, _ in found):
        ending.append("* never measured on this card")
    if tool != "moejax":
        ending.append("rows are queries, padded to the longest of a micro-batch, whatever the config's batching")
    ending.append(
        f"hours: {counted(first.steps, 'step')}, and {_number(first.besides_hours)} h of loading, compiling, "
        f"{counted(w.evaluations, 'evaluation')} and {counted(w.checkpoints, 'checkpoint')} (assumed rates); {_download(w)}"
    )
    changes = said_once((p.on, f"does not fit as it is; taken with {p.changes}") for p, _ in found if p.changes)
    bases = {p.basis for p, _ in found}
    lent = [f"{p.on}: {weeks}" for p, _ in found if (weeks := prices.weeks(p.price, p.hours)) is not None]
    notes = [*lent, *changes, *(bases if len(bases) == 1 else said_once((p.on, p.basis) for p, _ in found))]
    for p, w in found:
        if p.link is not None and w.experiment.mesh is not None:
            notes.append(
                f"{p.on}: weights {w.experiment.mesh.weights}: each card receives {told(p.link_bytes)} a step over {p.link}, "
                f"{p.link_seconds:.3g} s, {given.forecasts.overlap:.0%} hidden behind work (--overlap)"
            )
    return [*ending, *notes, *prices.without((p.gpu for p, _ in found if p.price is None), given.price_list, spot=given.spot)]
