"""`moejax profile CONFIG`: run the first steps of a config and trace some of them."""

from __future__ import annotations

import argparse

from moejax import config
from moejax.commands.arguments import add_config, settle_config
from moejax.runtime import prepare_jax


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, "e.g. profile.steps=5 data.batch_rows=4; the run is called NAME-profile, or as name=… says")


def run(options: argparse.Namespace) -> int:
    settle_config(options)
    experiment = config.load_profiled(options.config, options.overrides)
    prepare_jax(experiment.device)
    from moejax.training import loop

    return loop.run(experiment, resume=False, keep=False)
