"""`moejax estimate plan`: which GPU is cheapest, fastest under a budget, cheapest by a deadline."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moejax.commands import asked
from moejax.commands.predictions import (
    add_job_arguments,
    hours,
    job_facts,
    job_title,
    sellers_ask,
    show_predictions,
    usd,
    without_price,
)
from moejax.commands.tables import draw, print_json
from moejax.device import HERE

if TYPE_CHECKING:
    from moejax.estimator.plan import Prediction


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job_arguments(parser)
    parser.add_argument("--gpu", metavar="NAME[,NAME]", help=f"only these (or `{HERE}`); by default all of the table")
    parser.add_argument("--budget", type=float, metavar="USD", help="the fastest for at most so many dollars")
    parser.add_argument("--deadline", type=float, metavar="HOURS", help="the cheapest that is done by then")


def run(options: argparse.Namespace) -> int:
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
        told = {"software": software, "job": job_facts(job), "answers": chosen, "options": [dataclasses.asdict(p) for p in made.options]}
        print_json(told | {"left_out": {gpu: why.brief for gpu, why in made.left_out.items()}})
    else:
        unpriced = without_price([p.gpu for p in made.options if p.price is None], options)
        print(software)
        told_of = [*job.told, *asked.assumed(options, job)]
        show_predictions(job_title(job), made.options, told_of, [*sellers_ask(offers, made.options, options.spot), *unpriced])
        for why in memory.refusals(made.left_out):
            print(f"left out: {why}")
        for name, p in answers.items():
            print(f"{name}: " + (_least(name, made.options) if p is None else f"{p.gpu}, batch {p.batch}: {hours(p)}, {usd(p)}"))
    draw(options.plot, lambda figures, folder: figures.options(folder, job, made))
    return 0


def _least(answer: str, options: Sequence[Prediction]) -> str:
    """Where no option with a price answers: what the nearest one needs."""
    priced = [p for p in options if p.usd is not None]
    if not priced:
        return "none: no price is known of a GPU on which it fits"
    if "USD" in answer:
        p = min(priced, key=lambda p: p.usd or 0.0)
        return f"none; the cheapest needs {usd(p)}: {p.gpu}, batch {p.batch}, {hours(p)}"
    p = min(priced, key=lambda p: p.hours)
    return f"none; the fastest needs {hours(p)}: {p.gpu}, batch {p.batch}, {usd(p)}"
