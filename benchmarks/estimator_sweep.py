"""Is a step's time known before it is run? Five batch sizes of the demo's model, coefficients from three, the other two predicted.

    python benchmarks/estimator_sweep.py --out benchmarks/results/DAY-estimator-sweep.json

Each batch size is a run of `moejax profile` (its step_profile.json is what is read); `estimate.py fit`'s own code fits. Two splits: the
three smallest batches (the others lie beyond them), and the first, middle and last. Bar: 15 %. Run it when the machine is quiet: with
--repeats every batch size is run so often, in turn, and its fastest run counts, since other processes only ever add time.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import kept

from moejax import installation
from moejax.commands.estimate_fit import measured
from moejax.estimator.comparison import step_time, time_prediction
from moejax.estimator.fitting import Run, fit_runs

BAR = 0.15
SPLITS = {"the three smallest": (0, 1, 2), "first, middle, last": (0, 2, 4)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--rows", default="4,8,12,16,24", help="five batch sizes, ascending")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each run")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each batch size; the fastest counts")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = [int(r) for r in options.rows.split(",")]
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        turns = [[profile(options.config, r, options.steps, f"{folder}/{turn}") for r in rows] for turn in range(options.repeats)]
    runs = [min(same, key=lambda run: run.seconds) for same in zip(*turns, strict=True)]
    splits = {name: split(runs, chosen) for name, chosen in SPLITS.items()}
    for name, found in splits.items():
        print(f"fitted to {name} ({', '.join(str(rows[i]) for i in SPLITS[name])} rows):")
        for point in found["predicted"]:
            print(
                f"  {point['queries']:.1f} queries, {point['tokens']:.0f} tokens: predicted {1e3 * point['predicted_seconds']:.0f} ms, "
                f"measured {1e3 * point['measured_seconds']:.0f} ms: {100 * point['error']:+.1f} %"
            )
    worst = max(abs(p["error"]) for found in splits.values() for p in found["predicted"])
    print(f"largest error {100 * worst:.1f} %: {'within' if worst <= BAR else 'NOT within'} {BAR:.0%}; load at the start {load:.1f}")
    measured_runs = [
        {"rows": r, "queries": m.queries, "tokens": m.tokens, "seconds": m.seconds, "all_seconds": [turn[i].seconds for turn in turns]}
        for i, (r, m) in enumerate(zip(rows, runs, strict=True))
    ]
    report = kept.about(
        config=options.config, steps=options.steps, device=runs[0].device, versions=installation.versions(), load_at_start=load, bar=BAR,
        largest_error=worst, runs=measured_runs, splits=splits,
    )  # fmt: skip
    kept.write(options.out, report)
    return 0 if worst <= BAR else 1


def profile(config: str, rows: int, steps: int, folder: str) -> Run:
    """A profiled run with so many rows, as plain figures."""
    overrides = [f"name=rows{rows}", f"runs_dir={folder}", f"data.batch_rows={rows}", f"training.steps={steps}", "profile.steps=2"]
    command = [sys.executable, "-m", "moejax.cli", "profile", config, *overrides]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    run = measured(Path(folder) / f"rows{rows}")
    print(f"{rows} rows: {1e3 * run.seconds:.0f} ms a step of {run.tokens:.0f} tokens", flush=True)
    return run


def split(runs: list[Run], chosen: tuple[int, ...]) -> dict:
    """Coefficients from the chosen runs, and what they say of the others."""
    (fitted,) = fit_runs([runs[i] for i in chosen])
    law = step_time(time_prediction(fitted.entry, runs[0].share))
    predicted = [
        {"queries": r.queries, "tokens": r.tokens, "measured_seconds": r.seconds, "predicted_seconds": law.seconds(r.tokens, r.share),
         "error": law.seconds(r.tokens, r.share) / r.seconds - 1}
        for i, r in enumerate(runs) if i not in chosen
    ]  # fmt: skip
    return {"fitted_to": [runs[i].queries for i in chosen], "coefficients": fitted.entry.coefficients.tolist(), "predicted": predicted}


if __name__ == "__main__":
    sys.exit(main())
