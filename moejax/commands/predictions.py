"""What `estimate predict` and `estimate plan` share: their job's options, and how predictions are shown."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moejax.commands.tables import show_table
from moejax.estimator.units import counted

if TYPE_CHECKING:
    from moejax.estimator.job import Job
    from moejax.estimator.plan import Prediction
    from moejax.estimator.prices import Price

MEMORY = "whose memory limits the batch: the study's (default with its coefficients), or this project's (default with --coefficients)"


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument("--plot", metavar="DIR", help="draw figures (PNG) into this folder")


def job_title(job: Job) -> str:
    kind = f"{counted(job.experts_per_token, 'expert')} a token"
    queries, epochs = counted(job.queries, "query", "queries"), counted(job.epochs, "epoch")
    return f"{job.model} by {job.method}, {kind}: {queries} x {epochs} ({job.lengths.source})"


def job_facts(job: Job) -> dict[str, Any]:
    part = {key: getattr(job, key) for key in ("model", "method", "experts_per_token", "queries", "epochs", "batching", "row_tokens")}
    return part | {"lengths": job.lengths.source, "mean_tokens": job.lengths.mean, "cut_tokens": job.cut, "told": job.told}


def _number(value: float, decimals: int) -> str:
    """With so many decimals; below the first of them with two digits: 109.0, 0.0042."""
    return f"{value:,.{decimals}f}" if value == 0 or value >= 10**-decimals else f"{value:.2g}"


def _between(value: float, interval: tuple[float, float] | None, decimals: int) -> str:
    low_high = "" if interval is None else f" ({_number(interval[0], decimals)} to {_number(interval[1], decimals)})"
    return _number(value, decimals) + low_high


def hours(p: Prediction) -> str:
    hours, *interval = _between(p.hours, p.hours_interval, 1).split(" ", 1)
    return " ".join([hours, "h", *interval])


def usd(p: Prediction) -> str:
    if p.usd is None or p.price is None:
        return "no price known"
    usd, *interval = _between(p.usd, p.usd_interval, 2).split(" ", 1)
    return " ".join([usd, "USD", *interval, "at", p.price.told])


def without_price(names: Sequence[str], options: argparse.Namespace) -> list[str]:
    """GPUs that do but have no price, said once: which set was asked, and which has one."""
    from moejax.estimator import prices

    told = []
    for name in names:
        sets = [key for key, offers in prices.SETS.items() if prices.cheapest(offers, name) and key != options.prices]
        told.append(f"{name} (--prices {sets[0]} has one)" if sets and not options.spot else name)
    kind = "spot price" if options.spot else "price"
    brings = "--prices FILE with SpotPrice brings your own" if options.spot else "--prices FILE brings your own"
    return [f"no {kind} known in {options.prices}: {', '.join(told)}; {brings}"] if told else []


def sellers_ask(offers: Sequence[Price], found: Sequence[Prediction], spot: bool) -> list[str]:
    """What other sellers ask: one GPU's prices differ by more than any model's error."""
    from moejax.estimator import prices

    ranges = {p.gpu: prices.asked(offers, p.gpu, spot=spot) for p in found}
    told = [f"{gpu} {prices.dollars(low)} to {prices.dollars(high)}" for gpu, (low, high) in ((g, r) for g, r in ranges.items() if r)]
    return [f"USD/h that sellers ask: {', '.join(told)}"] if told else []


def show_predictions(title: str, found: Sequence[Prediction], rows_told: Sequence[str], offered: Sequence[str]) -> None:
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
