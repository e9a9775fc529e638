"""`moejax selftest`: stop and resume tiny runs on this machine, and compare the results."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from moejax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--faults", action="store_true", help="stop tiny runs at random moments and resume them (default)")
    parser.add_argument("--rounds", type=int, default=50, metavar="N", help="number of runs to stop (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the stops (default: 0)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the runs in this (empty) folder")


def run(options: argparse.Namespace) -> int:
    """Print a line for each round and the report. Returns 1 if there was a fault, else 0."""
    from moejax.selftest import faults

    if options.rounds < 1:
        raise UserError(f"--rounds {options.rounds}: expected 1 or more")
    if options.keep is not None and options.keep.exists() and any(options.keep.iterdir()):
        raise UserError(f"--keep {options.keep}: expected an empty folder, or a name that is free")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="moejax-selftest-") as top:
        folder = Path(top) if options.keep is None else options.keep.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        report = faults.Report()
        for line in faults.rounds(folder, options.rounds, options.seed, report):
            print(line, flush=True)
    print(*report.lines(), f"{time.monotonic() - began:.0f} s", sep="\n")
    return 1 if report.faults else 0
