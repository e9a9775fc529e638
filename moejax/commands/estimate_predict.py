"""`moejax estimate predict`: throughput, hours and dollars. What needs numbers is imported when it runs."""

from __future__ import annotations

import argparse
import dataclasses

from moejax.commands import asked
from moejax.commands.predictions import add_job_arguments, job_facts, job_title, sellers_ask, show_predictions, without_price
from moejax.commands.tables import draw, print_json
from moejax.device import HERE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job_arguments(parser)
    parser.add_argument("--gpu", required=True, metavar="NAME[,NAME]", help=f"GPUs by name, e.g. A40,A100-80,H100, or `{HERE}`")
    parser.add_argument("--batch", type=int, help="queries a step; by default the fastest that fits (--memory)")


def run(options: argparse.Namespace) -> int:
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
        told = {"software": software, "job": job_facts(job), "predictions": [dataclasses.asdict(p) for p in found]}
        print_json(told | {"left_out": {gpu: str(why) for gpu, why in left_out.items()}})
    else:
        missing = without_price([p.gpu for p in found if p.price is None], options)
        print(software)
        told_of = [*job.told, *asked.assumed(options, job)]
        show_predictions(job_title(job), found, told_of, [*sellers_ask(offers, found, options.spot), *missing])
        for why in left_out.values():
            print(f"left out: {why}")
    cards = {gpu.name: gpu for gpu in chosen}
    draw(options.plot, lambda figures, folder: figures.throughput(folder, job, found, entries, table | cards))
    return 0
