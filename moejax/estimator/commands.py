"""`estimate.py predict | plan`: arguments, tables, JSON. What a command needs is imported when it runs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejax.errors import UserError
from moejax.estimator import asked
from moejax.estimator.asked import HERE
from moejax.estimator.units import Gigabytes, counted

if TYPE_CHECKING:
    from moejax.estimator.job import Job
    from moejax.estimator.plan import Prediction
    from moejax.estimator.prices import Price

MEMORY = "whose memory limits the batch: the study's (default with its coefficients), or this project's (default with --coefficients)"


def add_arguments(parser: argparse.ArgumentParser) -> Any:
    """The commands that need nothing but numbers, and their options. Returns the parsers' group, for more commands."""
    commands = parser.add_subparsers(dest="estimate_command", required=True, metavar="COMMAND")
    reproduce = commands.add_parser("reproduce", help="the study's Tables III and IV and Figures 13 to 15 recomputed; then our model")
    reproduce.add_argument("--forms", action="store_true", help="also every form of the step-time model that was tried (a minute)")
    predict = commands.add_parser("predict", help="throughput, hours and dollars of a run")
    _job_arguments(predict)
    predict.add_argument("--gpu", required=True, metavar="NAME[,NAME]", help=f"GPUs by name, e.g. A40,A100-80,H100, or `{HERE}`")
    predict.add_argument("--batch", type=int, help="queries a step; by default the fastest that fits (--memory)")
    plan = commands.add_parser("plan", help="which GPU is cheapest, fastest under a budget, cheapest by a deadline")
    _job_arguments(plan)
    plan.add_argument("--gpu", metavar="NAME[,NAME]", help=f"only these (or `{HERE}`); by default all of the table")
    plan.add_argument("--budget", type=float, metavar="USD", help="the fastest for at most so many dollars")
    plan.add_argument("--deadline", type=float, metavar="HOURS", help="the cheapest that is done by then")
    for command in (reproduce, predict, plan):
        command.add_argument("--json", action="store_true", help="print JSON and nothing else")
        command.add_argument("--plot", metavar="DIR", help="draw figures (PNG) into this folder")
    return commands


def _job_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="mixtral", help="mixtral-8x7b (default) or blackmamba-2.8b")
    parser.add_argument("--method", help="qlora, lora or full; by default the one the study measured")
    parser.add_argument("--experts-per-token", type=int, metavar="K", help="1 to 8, the dense model; 2 by default, as in the study")
    parser.add_argument("--dataset", help="the study's: commonsense_15k, math_14k, hellaswag, gsm8k")
    parser.add_argument("--records", type=int, help="number of queries; with --length, or instead of a data set's own")
    parser.add_argument("--length", type=int, metavar="TOKENS", help="of every query")
    parser.add_argument("--lengths", metavar="FILE", help="tokens per query: a JSON list, or one number a line")
    parser.add_argument("--epochs", type=float, help="10 by default, as in the study")
    parser.add_argument("--batching", default="pad_longest", help="pad_longest (default, the study's), pad_bucket, pack or fixed")
    cut = "length of a row of `fixed` and `pack`; a longer query is cut there (by default only the study's own sets are cut, at 1024)"
    parser.add_argument("--row-tokens", type=int, metavar="TOKENS", help=cut)
    rounded = "what pad_longest rounds up to: 8, as in the study; with coefficients of this project's runs 16"
    parser.add_argument("--pad-multiple", type=int, metavar="TOKENS", help=rounded)
    parser.add_argument("--coefficients", metavar="FILE", help="measured coefficients; by default those of the study's curves")
    parser.add_argument("--memory", choices=("equation-1", "closed-form"), help=MEMORY)
    parser.add_argument("--gpu-file", metavar="FILE", help="your own GPUs in YAML")
    parser.add_argument("--prices", default="2026", metavar="SET|FILE", help="2026 (default), study, or a CSV (SkyPilot's columns)")
    parser.add_argument("--spot", action="store_true", help="spot prices (of a file that has them)")


def run(options: argparse.Namespace) -> int:
    """Run a command; mistakes of the user's are raised as UserError."""
    return {"predict": _predict, "plan": _plan}[options.estimate_command](options)


def _predict(options: argparse.Namespace) -> int:
    from moejax.estimator import coefficients, plan

    entries = coefficients.read(options.coefficients) if options.coefficients else coefficients.study()
    job, table = asked.job_of(options, entries), asked.gpu_table(options)
    offers = asked.offers_of(options, table)
    chosen = asked.gpus_of(options, table)
    found, left_out = plan.predict_all(
        job, chosen, entries, table, offers, batch=options.batch, spot=options.spot, room=asked.room_of(options)
    )
    software = asked.software(options, entries)
    if options.json:
        told = {"software": software, "job": _told(job), "predictions": [_plain(p) for p in found]}
        print_json(told | {"left_out": {gpu: str(why) for gpu, why in left_out.items()}})
    else:
        missing = _unpriced([p.gpu for p in found if p.price is None], options)
        print(software)
        _predictions(_title(job), found, [*job.told, *asked.assumed(options, job)], [*_offered(offers, found, options.spot), *missing])
        for why in left_out.values():
            print(f"left out: {why}")
    cards = {gpu.name: gpu for gpu in chosen}
    draw(options.plot, lambda figures, folder: figures.throughput(folder, job, found, entries, table | cards))
    return 0


def _plan(options: argparse.Namespace) -> int:
    from moejax.estimator import coefficients, memory, plan

    entries = coefficients.read(options.coefficients) if options.coefficients else coefficients.study()
    job, table = asked.job_of(options, entries), asked.gpu_table(options)
    offers = asked.offers_of(options, table)
    made = plan.plan(
        job, asked.gpus_of(options, table), entries, offers, table,
        budget_usd=options.budget, deadline_hours=options.deadline, spot=options.spot, room=asked.room_of(options),
    )  # fmt: skip
    answers: dict[str, Prediction | None] = {"cheapest": made.cheapest}
    if options.budget is not None:
        answers[f"fastest under {options.budget:,.10g} USD"] = made.fastest_under_budget
    if options.deadline is not None:
        answers[f"cheapest within {options.deadline:,.10g} h"] = made.cheapest_by_deadline
    software = asked.software(options, entries)
    if options.json:
        chosen = {name: None if p is None else p.gpu for name, p in answers.items()}
        told = {"software": software, "job": _told(job), "answers": chosen, "options": [_plain(p) for p in made.options]}
        print_json(told | {"left_out": {gpu: why.brief for gpu, why in made.left_out.items()}})
    else:
        unpriced = _unpriced([p.gpu for p in made.options if p.price is None], options)
        print(software)
        told_of = [*job.told, *asked.assumed(options, job)]
        _predictions(_title(job), made.options, told_of, [*_offered(offers, made.options, options.spot), *unpriced])
        for why in memory.refusals(made.left_out):
            print(f"left out: {why}")
        for name, p in answers.items():
            print(f"{name}: " + (_least(name, made.options) if p is None else f"{p.gpu}, batch {p.batch}: {_hours(p)}, {_usd(p)}"))
    draw(options.plot, lambda figures, folder: figures.options(folder, job, made))
    return 0


def _title(job: Job) -> str:
    kind = f"{counted(job.experts_per_token, 'expert')} a token"
    queries, epochs = counted(job.queries, "query", "queries"), counted(job.epochs, "epoch")
    return f"{job.model} by {job.method}, {kind}: {queries} x {epochs} ({job.lengths.source})"


def _told(job: Job) -> dict[str, Any]:
    part = {key: getattr(job, key) for key in ("model", "method", "experts_per_token", "queries", "epochs", "batching", "row_tokens")}
    return part | {"lengths": job.lengths.source, "mean_tokens": job.lengths.mean, "cut_tokens": job.cut, "told": job.told}


def _plain(p: Prediction) -> dict[str, Any]:
    return dataclasses.asdict(p)


def _number(value: float, decimals: int) -> str:
    """With so many decimals; below the first of them with two digits: 109.0, 0.0042."""
    return f"{value:,.{decimals}f}" if value == 0 or value >= 10**-decimals else f"{value:.2g}"


def _between(value: float, interval: tuple[float, float] | None, decimals: int) -> str:
    low_high = "" if interval is None else f" ({_number(interval[0], decimals)} to {_number(interval[1], decimals)})"
    return _number(value, decimals) + low_high


def _hours(p: Prediction) -> str:
    hours, *interval = _between(p.hours, p.hours_interval, 1).split(" ", 1)
    return " ".join([hours, "h", *interval])


def _usd(p: Prediction) -> str:
    if p.usd is None or p.price is None:
        return "no price known"
    usd, *interval = _between(p.usd, p.usd_interval, 2).split(" ", 1)
    return " ".join([usd, "USD", *interval, "at", p.price.told])


def _least(answer: str, options: Sequence[Prediction]) -> str:
    """Where no option with a price answers: what the nearest one needs."""
    priced = [p for p in options if p.usd is not None]
    if not priced:
        return "none: no price is known of a GPU on which it fits"
    if "USD" in answer:
        p = min(priced, key=lambda p: p.usd or 0.0)
        return f"none; the cheapest needs {_usd(p)}: {p.gpu}, batch {p.batch}, {_hours(p)}"
    p = min(priced, key=lambda p: p.hours)
    return f"none; the fastest needs {_hours(p)}: {p.gpu}, batch {p.batch}, {_usd(p)}"


def _unpriced(names: Sequence[str], options: argparse.Namespace) -> list[str]:
    """GPUs that do but have no price, said once: which set was asked, and which has one."""
    from moejax.estimator import prices

    told = []
    for name in names:
        sets = [key for key, offers in prices.SETS.items() if prices.cheapest(offers, name) and key != options.prices]
        told.append(f"{name} (--prices {sets[0]} has one)" if sets and not options.spot else name)
    kind = "spot price" if options.spot else "price"
    brings = "--prices FILE with SpotPrice brings your own" if options.spot else "--prices FILE brings your own"
    return [f"no {kind} known in {options.prices}: {', '.join(told)}; {brings}"] if told else []


def _offered(offers: Sequence[Price], found: Sequence[Prediction], spot: bool) -> list[str]:
    """What other sellers ask: one GPU's prices differ by more than any model's error."""
    from moejax.estimator import prices

    ranges = {p.gpu: prices.asked(offers, p.gpu, spot=spot) for p in found}
    told = [f"{gpu} {prices.dollars(low)} to {prices.dollars(high)}" for gpu, (low, high) in ((g, r) for g, r in ranges.items() if r)]
    return [f"USD/h that sellers ask: {', '.join(told)}"] if told else []


def _predictions(title: str, found: Sequence[Prediction], rows_told: Sequence[str], offered: Sequence[str]) -> None:
    rows = [
        (
            p.gpu if p.measured else f"{p.gpu} *",
            p.batch,
            round(p.tokens_per_step),
            _number(p.step_seconds, 2),
            _between(p.queries_per_second, p.queries_per_second_interval, 2),
            _between(p.hours, p.hours_interval, 1),
            "-" if p.usd is None else _between(p.usd, p.usd_interval, 2),
            "no price known" if p.price is None else p.price.told,
        )
        for p in found
    ]
    said: dict[str, list[str]] = {}
    for p in found:
        for note in (p.basis, *p.notes):
            said.setdefault(note, []).append(p.gpu)
    notes = [f"{', '.join(gpus)}: {note}" for note, gpus in said.items()]
    columns = ("GPU", "batch", "tokens", "s/step", "queries/s", "hours", "USD", "price")
    ending = [*rows_told]
    if any(p.hours_interval for p in found):
        ending.append("In brackets: where one measured run would lie with 95 %.")
    if not all(p.measured for p in found):
        spans = ", and the brackets span three rules of carrying" if any(p.hours_interval for p in found if not p.measured) else ""
        ending.append(f"* not measured: carried over{spans} (docs/estimator.md)")
    show_table(title, columns, rows, [*ending, *offered, *notes])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, Gigabytes):
        return f"{value}"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}" if abs(value) >= 100 else f"{value:.3f}"
    return str(value)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], notes: Sequence[str]) -> None:
    from rich.table import Table

    from moejax.terminal import Console

    console = Console(width=None if sys.stdout.isatty() else 150)
    table = Table(title=title, title_justify="left")
    numbers = [all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(columns))]
    for place, (column, number) in enumerate(zip(columns, numbers, strict=True)):
        table.add_column(column, justify="right" if number else "left", no_wrap=place == 0)
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    console.print(table)
    for note in notes:
        console.print(f"  {note}")
    console.print()


def print_json(document: Any) -> None:
    print(json.dumps(document, indent=1, default=float))


def draw(plot: str | None, which: Callable[[Any, Path], Sequence[Path]]) -> None:
    """Draw by estimator/figures.py into --plot's folder, if asked, and say where (on stderr: stdout may be JSON)."""
    if not plot:
        return
    from moejax.estimator import figures

    folder = Path(plot)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--plot {folder}: {error.strerror}") from error
    for path in which(figures, folder):
        print(f"drawn: {path}", file=sys.stderr)
