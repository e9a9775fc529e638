"""`moejax estimate plan`: which GPU is cheapest, fastest under a budget, cheapest by a deadline."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from moejax.commands import predictions as shared
from moejax.commands.tables import draw, print_json
from moejax.device import HERE
from moejax.estimator import coefficients, memory, plan
from moejax.estimator.plan import Prediction


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_job_arguments(parser)
    parser.add_argument("--gpu", metavar="NAME[,NAME]", help=f"only these (or `{HERE}`); by default all of the table")
    parser.add_argument("--budget", type=float, metavar="USD", help="the fastest for at most so many dollars")
    parser.add_argument("--deadline", type=float, metavar="HOURS", help="the cheapest that is done by then")


def run(options: argparse.Namespace) -> int:
    entries = coefficients.read(options.coefficients) if options.coefficients else coefficients.study()
    job, table = shared.job_of(options, entries), shared.gpu_table(options)
    offers = shared.offers_of(options, table)
    made = plan.plan(
        job, shared.gpus_of(options, table), entries, offers, table,
        budget_usd=options.budget, deadline_hours=options.deadline, spot=options.spot, room=shared.room_of(options),
    )  # fmt: skip
    answers: dict[str, Prediction | None] = {"cheapest": made.cheapest}
    if options.budget is not None:
        answers[f"fastest under {options.budget:,.10g} USD"] = made.fastest_under_budget
    if options.deadline is not None:
        answers[f"cheapest within {options.deadline:,.10g} h"] = made.cheapest_by_deadline
    if options.json:
        chosen = {name: None if p is None else p.gpu for name, p in answers.items()}
        told: dict[str, Any] = {"software": shared.software(options, entries), "job": shared.job_facts(job), "answers": chosen}
        told |= {"options": [dataclasses.asdict(p) for p in made.options]}
        print_json(told | {"left_out": {gpu: why.brief for gpu, why in made.left_out.items()}})
    else:
        shared.show(options, entries, job, offers, made.options)
        for why in memory.refusals(made.left_out):
            print(f"left out: {why}")
        for name, p in answers.items():
            found = "" if p is None else f"{p.gpu}, batch {p.batch}: {shared.hours(p)}, {shared.usd(p)}"
            print(f"{name}: {found or _least(name, made.options)}")
    draw(options.plot, lambda figures, folder: figures.options(folder, job, made))
    return 0


def _least(answer: str, options: Sequence[Prediction]) -> str:
    """Where no option with a price answers: what the nearest one needs."""
    priced = [p for p in options if p.usd is not None]
    if not priced:
        return "none: no price is known of a GPU on which it fits"
    if "USD" in answer:
        p = min(priced, key=lambda p: p.usd or 0.0)
        return f"none; the cheapest needs {shared.usd(p)}: {p.gpu}, batch {p.batch}, {shared.hours(p)}"
    p = min(priced, key=lambda p: p.hours)
    return f"none; the fastest needs {shared.hours(p)}: {p.gpu}, batch {p.batch}, {shared.usd(p)}"
