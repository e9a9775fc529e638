"""The real training step on this device: timed at a list of shapes with random weights, or run on demand.

    python benchmarks/step.py --config configs/mixtral_8x7b_cs_sparse.yaml --cases 8x512:2,32x512:2 --out FILE.json [key.sub=value …]
    python benchmarks/step.py --config configs/mixtral_8x7b_cs_sparse.yaml --cases 2x32:2 model.preset=mixtral-tiny   # in seconds, on a CPU
    python benchmarks/step.py --config configs/demo.yaml --serve [--random]

A case is ROWSxLENGTH:K, one query a row, k experts a token; with its seconds comes a receipt (moejax/estimator/receipts.py). `--tuned`:
kernels as `moejax tune` measured them here. `--trace`: one more step of each under jax's profiler, by phase and stage; all
steps are then without CUDA graphs, as traces want it. `--serve` says {"ready": true, …} once the step is compiled, then answers every line
"step" on stdin with one step's JSON line, always on the first batch, as benchmarks/pytorch/run.py --serve does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.92")
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import jax
import kept
import turns
from clock import copy_rate, matrix_rate
from floors import model_flops
from kept import RANDOM

from moejax import config as configuration
from moejax import device as machine
from moejax.config import Experiment
from moejax.data.batch import segment_lengths
from moejax.data.batching import stack
from moejax.data.pipeline import load as load_data
from moejax.data.tokenizer import load_tokenizer
from moejax.errors import UserError
from moejax.estimator import run_receipt
from moejax.hub.model import architecture, base_folder, create_model
from moejax.profiling.capture import broken_down
from moejax.training import prediction
from moejax.training.program import TrainProgram
from moejax.tuner import use


class Server:
    """A compiled step, its state and one batch. random: weights made on the device; traced: compiled so that a trace tells its parts."""

    def __init__(self, experiment: Experiment, *, random: bool = False, traced: bool = False):
        folder = base_folder(experiment)
        self.config = config = architecture(experiment, folder)
        tokenizer = (
            load_tokenizer(experiment.tokenizer or str(folder), experiment.added_tokens) if experiment.data.source else None
        )
        batches = load_data(experiment.data, tokenizer, experiment.seed, config.vocab_size).train.iterate(0)
        micro = experiment.training.gradient_accumulation
        self.batch = stack([next(batches) for _ in range(micro)], micro)
        self.program = TrainProgram(experiment, config, traced=traced)
        if random:
            self.program.load_random()
        else:
            self.program.load(create_model(experiment, config, folder))
        self.program.compile(*self.batch.tokens.shape[1:])
        self.lengths = segment_lengths(self.batch.segment_ids)

    def about(self) -> dict[str, Any]:
        return {"compile_seconds": self.program.compile_seconds, "compiler_peak_bytes": self.program.peak_bytes}

    def step(self) -> dict[str, Any]:
        """One step, batch sent and loss read."""
        seconds, metrics = self.program.timed(self.batch)
        real = int((self.batch.segment_ids > 0).sum())
        counted = {"queries": len(self.lengths), "real_tokens": real}
        return {"step_seconds": seconds, "loss": float(metrics["loss"])} | counted | machine.memory_bytes()


def rates(dtype: str) -> dict[str, Any]:
    """This device, and what a square product and a copy reach on it."""
    device = jax.local_devices()[0]
    gpu = device.platform == "gpu"
    reached = {
        "matrix_rate_flops": matrix_rate(8192 if gpu else 1024, dtype),
        "copy_bytes_per_second": copy_rate(1 << 30 if gpu else 1 << 27),
    }
    return {"device": device.device_kind, "platform": device.platform} | reached


def run_case(experiment: Experiment, steps: int, trace: bool, matrix_rate: float) -> dict[str, Any]:
    """Compile, run and time one case; with `trace`, where the time of one more step goes, in seconds. matrix_rate: FLOP/s reached here."""
    server = Server(experiment, random=True, traced=trace)
    before = machine.memory_bytes()  # random weights may take more than a step
    taken = [server.step() for _ in range(steps + 2)][2:]
    result = server.about() | turns.summary(taken) | {"before_the_steps": before, "loss": taken[-1]["loss"]}
    peak, source = machine.peak_flops(experiment.training.compute_dtype)
    result["peak_flops"] = {"value": peak, "source": source}
    result["model_flop_utilization"] = model_flops(experiment) / result["median"] / peak
    result["useful_share"] = model_flops(experiment) / result["median"] / matrix_rate
    measured = result.get("device_peak_bytes")
    result["receipt"] = run_receipt.of_step(
        experiment.with_defaults(server.config), server.config, prediction.engagement(experiment, server.config, server.batch.tokens.size),
        machine.name(), seconds=result["median"], real_tokens=taken[-1]["real_tokens"], steps=steps,
        peak_bytes=None if measured == before.get("device_peak_bytes") else measured, compiler_peak_bytes=server.program.peak_bytes,
    )  # fmt: skip
    if trace:
        batch = jax.device_put(server.batch)
        b = broken_down(1, lambda _: jax.block_until_ready((server.program.step(batch), server.program.state)))
        result["trace"] = {
            "step_seconds": b.step_seconds, "busy_seconds": b.busy_seconds, "attributed": b.attributed, "phases": b.phases,
            "stages": b.sums("stage"), "unnamed": b.unnamed[:5],
        }  # fmt: skip
    return result


def run_cases(options: argparse.Namespace) -> int:
    report = kept.about(**rates("bfloat16"), cases=[])
    for case in options.cases.split(","):
        shape, k = case.split(":")
        rows, length = (int(n) for n in shape.split("x"))
        row: dict[str, Any] = {"rows": rows, "row_tokens": length, "experts_per_token": int(k)}
        sizes = [*kept.of_rows(rows, length), f"model.experts_per_token={k}"]
        try:
            experiment = configuration.load(options.config, [*RANDOM, *sizes, *options.overrides])
            if options.tuned:
                row["tuned"] = [f"{site['operation']} {site['winner']}" for site in use.adopt_stored()]
            row |= run_case(experiment, options.steps, options.trace, report["matrix_rate_flops"])
        except (UserError, jax.errors.JaxRuntimeError) as error:  # out of memory in one cell: the others go on
            row["error"] = str(error)[:300]
        report["cases"].append(row)
        print(json.dumps(row), flush=True)
        kept.write(options.out, report)
    return int(any("error" in case for case in report["cases"]))


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def serve(options: argparse.Namespace) -> int:
    """Steps on demand. Exit code 2: a mistake of the user's; 3: out of memory."""
    try:
        experiment = configuration.load(options.config, options.overrides)
        about = {"ready": True, "versions": {"jax": jax.__version__, "python": sys.version.split()[0]}}
        about |= rates(experiment.training.compute_dtype)
        server = Server(experiment, random=options.random)
        say(about | server.about())
        for line in sys.stdin:
            known = line.strip() == "step"
            say(server.step() if known else {"error": f'unknown command {line.strip()!r}: expected "step"'})
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"out of memory: {str(error).splitlines()[0]}", file=sys.stderr)
        return 3
    return 0


@kept.refusing
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--cases", help="comma-separated ROWSxLENGTH:K")
    what.add_argument("--serve", action="store_true")
    parser.add_argument("--random", action="store_true", help="with --serve: weights made on the device, of the preset's sizes")
    parser.add_argument("--steps", type=int, default=5, help="with --cases: timed steps of each")
    parser.add_argument("--trace", action="store_true", help="with --cases: one more step, under the profiler")
    parser.add_argument("--tuned", action="store_true", help="with --cases: kernels as `moejax tune` chose here")
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    options = parser.parse_intermixed_args()
    return serve(options) if options.serve else run_cases(options)


if __name__ == "__main__":
    sys.exit(main())
