"""Fit the seconds that `benchmarks/gpu_model.py` derives from compiled programs by what needs no compiler: `estimator/own.py` answers so.

    python benchmarks/program_law.py [--update]

    seconds = floor · a + blocks · b + visits · c + scans · d

floor: `estimator/floors.py` at the same rates; visits: experts that the loop takes one by one; scans: blocks x chunks of a Mamba's row.
launch: what the launches of a block take in the program that has fewest, and so in a model of any size.
Printed with its errors; --update writes moejax/estimator/published/program.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
from gpu_model import GRAPH, IN_GRAPH, OUTSIDE

from moejax import config, gpus
from moejax.estimator import own, published
from moejax.estimator.least_squares import fit_seconds
from moejax.estimator.sizes import architecture_of

SOURCE = ROOT / "benchmarks" / "results" / "2026-11-30-gpu-program.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the coefficients into the package")
    options = parser.parse_args()
    columns, seconds, names, launches = [], [], [], []
    for step in json.loads(SOURCE.read_text())["steps"]:
        experiment = config.load(ROOT / "configs" / f"{step['config']}.yaml").changed("training", remat=step["remat"])
        sizes = architecture_of(experiment)
        given = experiment.with_defaults(sizes).changed("training", gradient_accumulation=1)
        counts = own.counts(given, sizes, gpus.find(step["gpu"]), step["rows"], step["row_tokens"], backend=step["backend"])
        columns.append(counts.columns)
        seconds.append(step["derived_ms"] / 1e3)
        launching = IN_GRAPH * step["kernels"] + (OUTSIDE - IN_GRAPH) * step["outside"] + GRAPH * step["graphs"]
        launches.append(launching / sizes.blocks)
        names.append(f"{step['config']} on {step['gpu']}, {step['rows']} x {step['row_tokens']}")
    x, y = np.array(columns), np.array(seconds)
    law = fit_seconds(x, y)
    errors = np.abs(x @ law / y - 1)
    told = dict(zip(own.COLUMNS, law.tolist(), strict=True)) | {"launch": min(launches)}
    median, most = float(np.median(errors)), float(np.quantile(errors, 0.9))
    print(json.dumps(told, indent=1))
    print(f"{len(y)} programs: error {median:.0%} in the median, {most:.0%} for nine of ten; largest {names[int(np.argmax(errors))]}")
    if options.update:
        errors_told = {"error_median": round(median, 3), "error_90": round(most, 3)}
        document = {"seconds": told, "programs": len(y), **errors_told, "source": SOURCE.name}
        (published.FOLDER / "program.json").write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
