"""`moejax tune CONFIG`: which of several kernels is exact and fastest on this machine, at a run's own shapes."""

from __future__ import annotations

import argparse

from moejax import config
from moejax.commands.arguments import add_config, settle_config
from moejax.errors import UserError
from moejax.progress import say
from moejax.runtime import prepare_jax


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--plan", action="store_true", help="list the candidates, then exit")
    parser.add_argument("--full", action="store_true", help="try every candidate, at most 8 minutes (default: the likeliest, at most 3)")
    parser.add_argument("--again", action="store_true", help="measure again what is stored")


def run(options: argparse.Namespace) -> int:
    settle_config(options)
    experiment = config.load(options.config, options.overrides)
    prepare_jax(experiment.device)
    from moejax.tuner import run as tuner
    from moejax.tuner import store, use

    device = store.device_asked()
    if options.plan:
        experiment, sizes = use.sizes(experiment)
        known = [] if options.again else use.known_of(store.place(device), store.about(device))
        say(tuner.plan_table(tuner.plan(experiment, sizes, device, known, full=options.full)))
        return 0
    sites = use.measure(experiment, full=options.full, anew=options.again)
    if not sites:
        raise UserError(f"{options.config}: this model has nothing to choose from here (dense experts, no attention that can be chosen)")
    say(*tuner.gains(sites), f"remembered in {store.place(store.device_asked())}; device.tune=off passes it over")
    return 0
