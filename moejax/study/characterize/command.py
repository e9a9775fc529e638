"""`moejax characterize`: its options. What it imports is light: `--help` answers at once."""

from __future__ import annotations

import argparse

from moejax.study.characterize.presets import PRESETS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    presets = "; ".join(f"{name}: {p.what}" for name, p in PRESETS.items())
    what = "experiments in YAML, and changes of single values of all of them, or, by sweep.NAME, of the sweep"
    parser.add_argument("overrides", nargs="*", default=[], metavar="CONFIG | key.sub=value", help=what)
    parser.add_argument("--config", action="append", default=[], metavar="CONFIG", help="the same by name; may be repeated")
    parser.add_argument("--preset", metavar="NAME", help=f"configs and sizes of the sweep. {presets}")
    parser.add_argument("--out", required=True, metavar="DIR", help="the study's folder; an unfinished one is continued")
    parser.add_argument("--plan", action="store_true", help="print the trials and how long each is expected to take; run nothing")
    parser.add_argument("--memory-limit", metavar="BYTES", help="an artificial limit, e.g. 2GB: as if the device had no more")
    parser.add_argument("--pretrained", action="store_true", help="the configs' own weights and data sets, downloaded; else random ones")


def run(options: argparse.Namespace) -> int:
    """Run it; mistakes of the user's are raised as UserError."""
    from moejax.study.characterize import console

    options.config = [*options.config, *(text for text in options.overrides if "=" not in text)]
    options.overrides = [text for text in options.overrides if "=" in text]
    return console.run(options)
