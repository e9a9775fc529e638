"""`moejax train CONFIG`, `python train.py --config CONFIG`: train, or with --dry-run describe the run."""

from __future__ import annotations

import argparse

from moejax import config
from moejax.commands.arguments import add_config, settle_config
from moejax.runtime import prepare_jax


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--resume", action="store_true", help="continue the run from its last checkpoint")
    parser.add_argument("--check-frozen", action="store_true", help="after the run, check that the frozen weights are unchanged")
    parser.add_argument("--dry-run", action="store_true", help="show parameters, memory, schedule and data, then exit")


def run(options: argparse.Namespace) -> int:
    settle_config(options)
    experiment = config.load(options.config, options.overrides)
    prepare_jax(experiment.device)
    if options.dry_run:
        from moejax.training import dry_run

        dry_run.report(experiment)
        return 0
    from moejax.training import loop
    from moejax.tuner import use

    if not options.resume:
        use.before_start(experiment)
    return loop.run(experiment, resume=options.resume, check_frozen=options.check_frozen)
