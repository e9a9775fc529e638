"""`moejax profile CONFIG`: a config's first steps, some of them traced."""

from __future__ import annotations

import argparse

from moejax import config
from moejax.commands.arguments import add_config, settle_config
from moejax.commands.breakdown import NCU, show
from moejax.runtime import prepare_jax


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, "e.g. profile.steps=5 data.batch_rows=4; the run is called NAME-profile")
    parser.add_argument("--ncu", default=None, metavar="CSV", help=NCU)


def run(options: argparse.Namespace) -> int:
    settle_config(options)
    experiment = config.load_profiled(options.config, options.overrides)
    prepare_jax(experiment.device)
    from moejax.training import loop

    code = loop.run(experiment, resume=False, keep=False)
    if code == 0 and options.ncu:
        return show([f"{experiment.runs_dir}/{experiment.name}"], ncu=options.ncu)
    return code
