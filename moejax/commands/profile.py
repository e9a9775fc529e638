"""`moejax profile CONFIG`: a config's first steps, some of them traced."""

from __future__ import annotations

import argparse

from moejax import config
from moejax.commands.breakdown import NCU, show
from moejax.runtime import prepare_jax


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="experiment in YAML; the run is called NAME-profile")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value", help="e.g. profile.steps=5 data.batch_rows=4")
    parser.add_argument("--ncu", default=None, metavar="CSV", help=NCU)


def run(options: argparse.Namespace) -> int:
    experiment = config.load_profiled(options.config, options.overrides)
    prepare_jax(experiment.device)
    from moejax.training import loop

    code = loop.run(experiment, resume=False, keep=False)
    if code == 0 and options.ncu:
        return show([f"{experiment.runs_dir}/{experiment.name}"], ncu=options.ncu)
    return code
