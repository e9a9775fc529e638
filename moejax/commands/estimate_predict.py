"""`moejax estimate predict`: throughput, hours and dollars."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from moejax.commands import predictions as shared
from moejax.commands.tables import draw, print_json
from moejax.device import HERE
from moejax.estimator import coefficients, plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_job_arguments(parser)
    parser.add_argument("--gpu", required=True, metavar="NAME[,NAME]", help=f"GPUs by name, e.g. A40,A100-80,H100, or `{HERE}`")
    parser.add_argument("--batch", type=int, help="queries a step; by default the fastest that fits (--memory)")


def run(options: argparse.Namespace) -> int:
    entries = coefficients.read(options.coefficients) if options.coefficients else coefficients.study()
    job, table = shared.job_of(options, entries), shared.gpu_table(options)
    offers = shared.offers_of(options, table)
    chosen = shared.gpus_of(options, table)
    found, left_out = plan.predict_all(
        job, chosen, entries, table, offers, batch=options.batch, spot=options.spot, room=shared.room_of(options)
    )
    if options.json:
        told: dict[str, Any] = {"software": shared.software(options, entries), "job": shared.job_facts(job)}
        told |= {"predictions": [dataclasses.asdict(p) for p in found]}
        print_json(told | {"left_out": {gpu: str(why) for gpu, why in left_out.items()}})
    else:
        shared.show(options, entries, job, offers, found)
        for why in left_out.values():
            print(f"left out: {why}")
    cards = {gpu.name: gpu for gpu in chosen}
    draw(options.plot, lambda figures, folder: figures.throughput(folder, job, found, entries, table | cards))
    return 0
