"""`moejax estimate compare RUN…`: predicted against measured of finished runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from moejax.commands.tables import print_json
from moejax.errors import UserError
from moejax.estimator import coefficients, comparison
from moejax.estimator.units import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a finished run's folder, e.g. runs/demo")
    parser.add_argument("--coefficients", metavar="FILE", help="of this model and device; by default those that the run was told")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")


def run(options: argparse.Namespace) -> int:
    entries = coefficients.read(options.coefficients) if options.coefficients else ()
    found = {}
    for path in options.runs:
        told = comparison.read_prediction(Path(path))
        entry = None
        if options.coefficients:
            key = told["model"], told["method"], told["gpu"]
            entry = next((e for e in entries if (e.model, e.method, e.gpu) == key), None)
            if entry is None:
                raise UserError(f"--coefficients {options.coefficients} has none of {key[0]} by {key[1]} on {key[2]}, which {path} ran")
        found[path] = comparison.compare(Path(path), entry)
    if options.json:
        print_json(found)
        return 0
    for folder, document in found.items():
        print(f"{folder}: {document['model']} by {document['method']} on {document['gpu']}, {counted(document['steps'], 'step')}")
        for line in comparison.lines(document):
            print(f"  {line}")
        print(f"  kept in {Path(folder) / comparison.COMPARISON}")
    return 0
