"""Arguments that several commands have: CONFIG with its changes, and RUN, by place or by the name that they had; names of GPUs; counts."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from moejax.errors import UserError

RECEIPTS_HELP = "a folder with your own measurements: receipts (*.json), or runs, each of which has its receipt.json"

def add_config(parser: argparse.ArgumentParser, changes: str = "change single values, e.g. training.epochs=3") -> None:
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="experiment in YAML (`moejax init` writes one)")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value", help=changes)
    parser.add_argument("--config", dest="file", metavar="CONFIG", help="the same by name")


def settle_config(options: argparse.Namespace, otherwise: str = "") -> None:
    """`options.config` and `options.overrides` as they are meant. Raises UserError where no config is given, and nothing `otherwise`."""
    if options.file is not None:  # what stands in its place is a change
        options.overrides = [text for text in (options.config, *options.overrides) if text is not None]
        options.config = options.file
    if options.config is None:
        raise UserError(f"which experiment? Give its CONFIG (`moejax init` writes one){otherwise}")


class _Old(argparse.Action):
    """An option's name of the release before: it does the same, and says what it is called now. In no help."""

    def __init__(self, now: str, **settings: Any):
        super().__init__(**settings | {"help": argparse.SUPPRESS})
        self.now = now

    def __call__(self, parser: argparse.ArgumentParser, options: argparse.Namespace, value: Any, option: str | None = None) -> None:
        print(f"note: {option} is now {self.now}; the old name goes with the next release", file=sys.stderr)
        setattr(options, self.dest, value)


def add_old(parser: argparse.ArgumentParser, name: str, now: str, **settings: Any) -> None:
    parser.add_argument(name, action=_Old, now=now, **settings)


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", metavar="RUN", help="a finished run's folder, e.g. runs/demo, or a model's in Hub layout")
    add_old(parser, "--run", "RUN by itself", dest="folder")


def settle_run(options: argparse.Namespace) -> None:
    """`options.run` as it is meant. Raises UserError where none is given, or two are."""
    if (options.run is None) == (options.folder is None):
        raise UserError("which run? Give one RUN: a finished run's folder, e.g. runs/demo, or a model's in Hub layout")
    options.run = options.folder or options.run


def names_of(gpus: str) -> list[str]:
    """The names in --gpu. Raises UserError where there is none."""
    names = [name.strip() for name in gpus.split(",") if name.strip()]
    if not names:
        raise UserError(f"--gpu {gpus!r}: expected names of GPUs, e.g. A40,H100")
    return names


def check_counts(options: argparse.Namespace, *names: str) -> None:
    """Raises UserError for an option that is given and is less than 1."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected 1 or more")
