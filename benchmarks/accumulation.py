"""A step's micro-batches one after the other, and all together in each layer: the same step by both orders, in turn, on this device.

    python benchmarks/accumulation.py [--config FILE] [--micro 4] [--shape 1x256] [--steps 8] [--out FILE] [key.sub=value …]

By default with the sizes of `make bench`'s Mixtral, its experts in NF4. Weights and tokens are random.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import jax
import kept
import step_times
from clock import in_turn
from step import RANDOM, Server

from moejax import config as configuration
from moejax.errors import UserError

ORDERS = ("micro_batch_major", "layer_major")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--micro", type=int, default=4, help="micro-batches of a step")
    parser.add_argument("--shape", default="1x256", help="rows x tokens of each")
    parser.add_argument("--steps", type=int, default=8, help="timed, of each order")
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", default=[])
    options = parser.parse_intermixed_args()
    rows, length = (int(n) for n in options.shape.split("x"))
    own = [*step_times.MIXTRAL, "quantization.format=nf4"] if options.config is None else []
    sizes = [f"data.batch_rows={rows}", f"data.row_tokens={length}", f"data.max_length={length}"]
    path = options.config or step_times.ROOT / "configs" / "bench_mixtral_tiny.yaml"
    report = kept.about(device=jax.local_devices()[0].device_kind, micro_batches=options.micro, rows=rows, row_tokens=length)
    try:
        overrides = [*RANDOM, *own, *sizes, f"training.gradient_accumulation={options.micro}", *options.overrides]
        servers = {
            order: Server(configuration.load(path, [*overrides, f"training.accumulation={order}"]), random=True) for order in ORDERS
        }
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    losses = {order: server.step()["loss"] for order, server in servers.items()}
    seconds = in_turn({order: lambda server=server: server.step() for order, server in servers.items()}, options.steps)
    medians = {order: median(taken) for order, taken in seconds.items()}
    report |= {
        "seconds": seconds, "median": medians, "first_loss": losses, "times_as_fast": medians[ORDERS[0]] / medians[ORDERS[1]],
        "median_of_pairs": median(one / other for one, other in zip(*seconds.values(), strict=True)),
        "compiler_peak_bytes": {order: server.program.peak_bytes for order, server in servers.items()},
    }  # fmt: skip
    print(report)
    kept.write(options.out, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
