"""The least a step can take, stage by stage: FLOPs over the matrix rate, bytes over the bandwidth, whichever is longer. Arithmetic alone.

    python benchmarks/floors.py [--config configs/mixtral_8x7b_cs_sparse.yaml] [--shapes 1x128,8x512,32x512,24x2048]
                                [--tflops 780 --gb-per-second 4300] [--json]

What is counted: `moejax/estimator/floors.py`. The default rates were measured by others on one H200: an 8192-cubed bf16 product and a
copy.
The sum of the stages is a floor of this program, kernel after kernel, not of the task. What a profiled run took: `moejax breakdown`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from moejax import config as configuration
from moejax.config import Experiment
from moejax.errors import UserError
from moejax.estimator.floors import floors
from moejax.estimator.sizes import architecture_of


def model_flops(experiment: Experiment, rows: int | None = None, length: int | None = None) -> float:
    """Of a step, as model FLOP utilization counts them (moejax/training/flops.py): no recomputation. Rows of a query each; by default the
    experiment's own."""
    from moejax.hub.model import adapter_config
    from moejax.training import flops

    rows, length = rows or experiment.data.batch_rows, length or experiment.data.longest_row
    counted = flops.count(architecture_of(experiment), adapter_config(experiment))
    return counted.step(rows * length, [length] * rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", default="configs/mixtral_8x7b_cs_sparse.yaml")
    parser.add_argument("--shapes", default="1x128,8x512,32x512,24x2048", help="rows x tokens, comma-separated")
    parser.add_argument("--tflops", type=float, default=780.0, help="matrix rate (default: 780)")
    parser.add_argument("--gb-per-second", type=float, default=4300.0, help="bandwidth (default: 4300)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    options = parser.parse_args()
    rates = options.tflops * 1e12, options.gb_per_second * 1e9
    try:
        experiment = configuration.load(options.config, options.overrides)
        config = architecture_of(experiment)
        shapes = [tuple(int(n) for n in shape.split("x")) for shape in options.shapes.split(",")]
        if any(len(shape) != 2 or min(shape) < 1 for shape in shapes):
            raise UserError(f"--shapes {options.shapes}: expected rows x tokens, e.g. 8x512,24x2048")
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found: dict[str, Any] = {}
    for rows, length in shapes:
        stages = floors(experiment, config, rows, length)
        seconds = [s.seconds(*rates) for s in stages]
        useful = model_flops(experiment, rows, length)
        whole = sum(t for t, _ in seconds)
        found[f"{rows}x{length}"] = {
            "stages": {s.name: vars(s) | {"floor_seconds": t, "bound": b} for s, (t, b) in zip(stages, seconds, strict=True)},
            "floor_seconds": whole, "tokens_per_second": rows * length / whole, "share_of_matrix_rate": useful / whole / rates[0],
        }  # fmt: skip
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    print(f"{options.config}: floor in ms at {options.tflops:g} TFLOP/s and {options.gb_per_second:g} GB/s (c: compute, b: bandwidth)\n")
    print("| stage | " + " | ".join(found) + " |\n|---|" + "---|" * len(found))
    for name in next(iter(found.values()))["stages"]:
        cells = [f["stages"][name] for f in found.values()]
        print(f"| {name} | " + " | ".join(f"{1e3 * c['floor_seconds']:.1f} {c['bound'][0]}" for c in cells) + " |")
    print("| **all** | " + " | ".join(f"**{1e3 * f['floor_seconds']:.1f}**" for f in found.values()) + " |")
    print("| tokens/s | " + " | ".join(f"{f['tokens_per_second']:,.0f}" for f in found.values()) + " |")
    print("| useful FLOPs, of the matrix rate | " + " | ".join(f"{100 * f['share_of_matrix_rate']:.0f} %" for f in found.values()) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
