"""moejax's side of a comparison: training steps of an experiment on demand, as benchmarks/pytorch/run.py --serve does in PyTorch.

    python benchmarks/serve.py --config FILE [--random] [--peaks] [key.sub=value …]

Says {"ready": true, …} once the step is compiled, then answers every line "step" on stdin with one step's JSON line, always on the
first batch.
--random: weights made on the device, of the preset's sizes. --peaks: its matrix rate and a copy's bandwidth are measured first.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import jax
from clock import copy_rate, matrix_rate

from moejax import config as configuration
from moejax.config import Experiment
from moejax.data.batch import segment_lengths
from moejax.data.batching import stack
from moejax.data.pipeline import load as load_data
from moejax.data.tokenizer import load_tokenizer
from moejax.device import memory_bytes
from moejax.errors import UserError
from moejax.hub import weights
from moejax.hub.model import architecture, create_model
from moejax.training.program import TrainProgram


class Server:
    """A compiled step, its state and one batch."""

    def __init__(self, experiment: Experiment, random: bool = False, peaks: bool = False):
        gpu, dtype = jax.local_devices()[0].platform == "gpu", experiment.training.compute_dtype
        self.rate = matrix_rate(8192 if gpu else 1024, dtype) if peaks else None
        self.bandwidth = copy_rate(1 << 30 if gpu else 1 << 27) if peaks else None
        source = experiment.model.source
        folder = None if source is None else weights.resolve(source, experiment.model.revision)
        config = architecture(experiment, folder)
        tokenizer = (
            load_tokenizer(experiment.tokenizer or str(folder), experiment.added_tokens) if experiment.data.source else None
        )
        dataset = load_data(experiment.data, tokenizer, experiment.seed, config.vocab_size)
        batches = dataset.train.iterate(0)
        self.batch = stack(
            [next(batches) for _ in range(experiment.training.gradient_accumulation)], experiment.training.gradient_accumulation
        )
        self.program = TrainProgram(experiment, config)
        if random:
            self.program.load_random()
        else:
            self.program.load(create_model(experiment, config, folder))
        self.program.compile(*self.batch.tokens.shape[1:])
        self.lengths = segment_lengths(self.batch.segment_ids)

    def about(self) -> dict[str, Any]:
        device = jax.local_devices()[0]
        return {
            "ready": True, "versions": {"jax": jax.__version__, "python": sys.version.split()[0]},
            "device": device.device_kind, "platform": device.platform, "matrix_rate_flops": self.rate,
            "copy_bytes_per_second": self.bandwidth, "compile_seconds": self.program.compile_seconds,
            "compiler_peak_bytes": self.program.peak_bytes,
        }  # fmt: skip

    def step(self) -> dict[str, Any]:
        """One step, batch sent and loss read."""
        seconds, metrics = self.program.timed(self.batch)
        real = int((self.batch.segment_ids > 0).sum())
        return {"step_seconds": seconds, "loss": float(metrics["loss"]), "queries": len(self.lengths), "real_tokens": real} | memory_bytes()


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--peaks", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    options = parser.parse_args()
    try:
        server = Server(configuration.load(options.config, options.overrides), options.random, options.peaks)
        say(server.about())
        for line in sys.stdin:
            known = line.strip() == "step"
            say(server.step() if known else {"error": f'unknown command {line.strip()!r}: expected "step"'})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"out of memory: {str(error).splitlines()[0]}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
