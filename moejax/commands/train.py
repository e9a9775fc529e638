"""`moejax train CONFIG`, `python train.py --config CONFIG`: a run, or with --dry-run what it would be."""

from __future__ import annotations

import argparse

from moejax import config
from moejax.errors import UserError
from moejax.runtime import prepare_jax


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="experiment in YAML (`moejax init` writes one)")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value", help="change single values, e.g. training.epochs=3")
    parser.add_argument("--config", dest="file", metavar="CONFIG", help="the same by name")
    parser.add_argument("--resume", action="store_true", help="continue the run of this name from its last checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="show parameters, memory and schedule; load and train nothing")


def run(options: argparse.Namespace) -> int:
    if options.file is not None:
        options.overrides = [text for text in (options.config, *options.overrides) if text is not None]
        options.config = options.file
    if options.config is None:
        raise UserError("which experiment? `moejax train CONFIG` (`moejax init` writes one)")
    experiment = config.load(options.config, options.overrides)
    prepare_jax(experiment.device)
    if options.dry_run:
        from moejax.training import dry_run

        return dry_run.report(experiment)
    from moejax.training import loop

    return loop.run(experiment, resume=options.resume)
