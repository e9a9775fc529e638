"""Micro-batches one after the other, and layer by layer together: seconds of a step on this machine, in turn.

    python benchmarks/accumulation.py --out benchmarks/results/<date>-accumulation.json

The Mixtral of `make bench` with its experts in NF4, 4 micro-batches of 1 x 256 tokens, random weights.
"""

import argparse
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path

import kept
import turns
from step_times import CPU_CASES, ROOT

CASE = CPU_CASES["mixtral"]
OVERRIDES = [
    *kept.RANDOM, *CASE.overrides, "quantization.format=nf4", "training.gradient_accumulation=4", *kept.of_rows(1, 256),
]  # fmt: skip
ORDERS = ("micro_batch_major", "layer_major")


@kept.refusing
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=9)
    options = parser.parse_args()
    with ExitStack() as stack:
        sides = {
            order: stack.enter_context(
                turns.jax_side(
                    ROOT / "configs" / f"{CASE.config}.yaml", [*OVERRIDES, f"training.accumulation={order}"], ["--random"],
                    {"JAX_PLATFORMS": "cpu"},
                )
            )
            for order in ORDERS
        }  # fmt: skip
        found = turns.alternate(sides, options.steps)
    seconds = {order: [step["step_seconds"] for step in steps] for order, steps in found.items()}
    plain, together = (statistics.median(seconds[order]) for order in ORDERS)
    losses = {order: steps[-1]["loss"] for order, steps in found.items()}
    report = kept.about(overrides=OVERRIDES, seconds=seconds, losses=losses, ratio=plain / together)
    kept.write(options.out, report)
    print(f"layer by layer a step takes {together:.3f} s, one after the other {plain:.3f} s: {plain / together:.2f} times")
    return 0


if __name__ == "__main__":
    sys.exit(main())
