"""`moejax estimate plan`: choose a GPU by price, budget or deadline; with CONFIG, list the placements that fit a GPU."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from moejax.commands import estimate_predict as shared
from moejax.commands.arguments import add_config
from moejax.commands.tables import draw, print_json
from moejax.device import HERE
from moejax.estimator import memory, plan
from moejax.estimator.plan import Prediction


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    shared.add_job_arguments(parser)
    parser.add_argument("--gpu", metavar="NAME[,NAME]", help=f"GPU names, or `{HERE}` for this machine (default: all known GPUs)")
    parser.add_argument("--budget", type=float, metavar="USD", help="maximum cost: show the fastest GPU within it")
    parser.add_argument("--plot", metavar="DIR", help="folder for a PNG figure of hours and dollars")
    parser.add_argument("--html", metavar="FILE", help="write the plan as a self-contained HTML page (not with --tool study)")
    parser.add_argument("--deadline", type=float, metavar="HOURS", help="maximum duration: show the cheapest GPU within it")


def run(options: argparse.Namespace) -> int:
    if not shared.of_the_study(options):
        from moejax.commands import estimate_run, plan_config  # the config's schema comes with them

        return (plan_config if plan_config.asked(options) else estimate_run).plan(options)
    given = shared.asked(options)
    made = plan.plan(given, budget_usd=options.budget, deadline_hours=options.deadline)
    answers: dict[str, Prediction | None] = {"cheapest": made.cheapest}
    if options.budget is not None:
        answers[f"fastest under {options.budget:,.10g} USD"] = made.fastest_under_budget
    if options.deadline is not None:
        answers[f"cheapest within {options.deadline:,.10g} h"] = made.cheapest_by_deadline
    if options.json:
        chosen = {name: None if p is None else p.named for name, p in answers.items()}
        print_json(shared.facts(options, given) | {
            "answers": chosen, "options": [dataclasses.asdict(p) for p in made.options],
            "left_out": {gpu: why.brief for gpu, why in made.left_out.items()},
        })  # fmt: skip
    else:
        shared.show(options, given, made.options)
        for why in memory.refusals(made.left_out):
            print(f"left out: {why}")
        for name, p in answers.items():
            found = "" if p is None else f"{p.named}, batch {p.batch}: {shared.hours(p)}, {shared.usd(p)}"
            print(f"{name}: {found or _least(name, made.options)}")
    draw(options.plot, lambda figures, folder: figures.options(folder, figures.title(given.job), made.options))
    return 0


def _least(answer: str, options: Sequence[Prediction]) -> str:
    """Where no option with a price answers: what the nearest one needs."""
    priced = [p for p in options if p.usd is not None]
    if not priced:
        return "none: no price is known of a GPU on which it fits"
    if "USD" in answer:
        p = min(priced, key=lambda p: p.usd or 0.0)
        return f"none; the cheapest needs {shared.usd(p)}: {p.named}, batch {p.batch}, {shared.hours(p)}"
    p = min(priced, key=lambda p: p.hours)
    return f"none; the fastest needs {shared.hours(p)}: {p.named}, batch {p.batch}, {shared.usd(p)}"
