"""`moejax estimate compare RUN…`: compare predicted and measured memory and time of finished runs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moejax.commands.tables import print_json, show_table
from moejax.errors import UserError
from moejax.estimator import coefficients, comparison, run_receipt
from moejax.estimator.run_receipt import Drift
from moejax.estimator.units import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders of finished runs, e.g. runs/demo (default: all in --runs-dir)")
    parser.add_argument("--runs-dir", default="runs", metavar="DIR", help="folder with the runs to compare (default: runs)")
    parser.add_argument("--coefficients", metavar="FILE", help="coefficients of this model and device (default: those the run used)")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")


def run(options: argparse.Namespace) -> int:
    entries = coefficients.read(options.coefficients) if options.coefficients else ()
    found = {}
    for path in options.runs or _all(Path(options.runs_dir)):
        told = comparison.read_prediction(Path(path))
        entry = None
        if options.coefficients:
            key = told["model"], told["method"], told["gpu"]
            entry = next((e for e in entries if (e.model, e.method, e.gpu) == key), None)
            if entry is None:
                raise UserError(f"--coefficients {options.coefficients} has none of {key[0]} by {key[1]} on {key[2]}, which {path} ran")
        found[path] = comparison.compare(Path(path), entry)
    drifts = run_receipt.drift(list(found.values()))
    if options.json:
        print_json(found if options.runs else {"runs": found, "drift": [asdict(d) for d in drifts]})
        return 0
    if not options.runs:
        _table(found, drifts)
        return 0
    for folder, document in found.items():
        print(f"{folder}: {document['model']} by {document['method']} on {document['gpu']}, {counted(document['steps'], 'step')}")
        for line in comparison.lines(document):
            print(f"  {line}")
        print(f"  kept in {Path(folder) / comparison.COMPARISON}")
    return 0


def _all(folder: Path) -> list[str]:
    """Finished runs of a folder. Raises UserError where there is none."""
    found = sorted(str(path.parent) for path in folder.glob(f"*/{run_receipt.RECEIPT}"))
    if not found:
        raise UserError(f"--runs-dir {folder} holds no finished run (none has a {run_receipt.RECEIPT}): expected RUN, or another folder")
    return found


def _table(found: Mapping[str, dict[str, Any]], drifts: Sequence[Drift]) -> None:
    """Predicted and measured of all runs side by side; then the errors by device and version."""
    cells = [
        (Path(path).name, d["model"], d["gpu"], d["version"], s["predicted"], s["measured"], _percent(s["error"]),
         m["predicted_bytes"] / 1e9, None if m["error"] is None else m["measured_bytes"] / 1e9, _percent(m["error"]))
        for path, d in found.items()
        for s, m in [(d["step_seconds"], d["memory"])]
    ]  # fmt: skip
    columns = ("run", "model", "device", "version", "s/step predicted", "measured", "error", "GB predicted", "measured", "error")
    notes = ["memory is compared where the device's allocator says its peak; seconds where the device was known or coefficients were there"]
    show_table(f"{counted(len(found), 'run')}, predicted and measured", columns, cells, notes)
    rows = [(d.device, d.version, d.runs, _percent(d.seconds), _percent(d.memory)) for d in drifts]
    show_table("drift by version: median error", ("device", "version", "runs", "seconds", "memory"), rows, [])


def _percent(error: float | None) -> str:
    return "-" if error is None else f"{100 * error:+.1f} %"
