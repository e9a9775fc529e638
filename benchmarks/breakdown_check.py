"""Check the trace's breakdown against an independent clock, on this machine.

    python benchmarks/breakdown_check.py [--model blackmamba] [--remat none] [--out FILE.json]

A small Mixtral with NF4 experts and LoRA (or a BlackMamba): its train step is traced and broken down; then its forward pass alone (with
all that it keeps for the backward pass: `jax.vjp`), and forward and backward alone, are compiled by themselves and timed. Of the step,
the phase `forward` should take what the first takes, and `forward + recompute + backward` what the second takes. The step is timed
without the tracer too: what the tracer costs is no error of the breakdown.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import jax
import kept

from moejax.config import Experiment
from moejax.data.batch import Batch
from moejax.data.batching import assemble, stack, synthetic
from moejax.estimator.roofline import STUDY_MODELS
from moejax.hub.model import create_model
from moejax.profiling import breakdown, xplane
from moejax.training.program import TrainProgram
from moejax.training.step import sums

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_layers": 6, "vocab_size": 2048}


def setup(model: str, k: int, remat: str, rows: int, row_tokens: int, **other: int) -> tuple[TrainProgram, Batch]:
    """The step with its weights, not compiled yet, and a batch of random tokens. other: sizes instead of SIZES."""
    full, sizes = STUDY_MODELS[model][1] == "full", SIZES | other
    sizes |= {} if full else {"num_heads": 8, "num_kv_heads": 4, "head_dim": 32, "max_position_embeddings": row_tokens}
    experiment = Experiment.model_validate({
        "name": model, "model": {"preset": f"{model}-tiny", "overrides": sizes, "experts_per_token": k},
        "adapter": None if full else {}, "quantization": {"format": "none" if full else "nf4"},
        "data": {"batching": "fixed", "row_tokens": row_tokens, "batch_rows": rows},
        "training": {"steps": 1, "learning_rate": 1e-4, "schedule": "constant", "compute_dtype": "float32", "remat": remat},
    })  # fmt: skip
    config = experiment.model.architecture(None)
    program = TrainProgram(experiment, config)
    program.load(create_model(experiment, config, None))
    queries = synthetic(experiment.data, config.vocab_size, 0, rows)
    return program, jax.device_put(stack([assemble([[query] for query in queries], rows, row_tokens)], 1))


def seconds(function: Any, *arguments: Any) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def saved(loss: Any, trainable: Any, frozen: Any, batch: Batch) -> Any:
    """The loss, and every array that its backward pass would need."""
    value, pull = jax.vjp(lambda t: loss(t, frozen, batch), trainable)
    return value, [leaf for leaf in jax.tree.leaves(pull) if isinstance(leaf, jax.Array)]


def traced(program: TrainProgram, batch: Batch) -> breakdown.Breakdown:
    """The breakdown of one step."""
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level, options.python_tracer_level = 1, 0
    with tempfile.TemporaryDirectory() as folder:
        with (
            jax.profiler.trace(folder, profiler_options=options),
            jax.profiler.StepTraceAnnotation("train", step_num=1),
        ):
            jax.block_until_ready((program.step(batch), program.state))
        return breakdown.analyze(xplane.read(xplane.find(Path(folder))))


def check(model: str, k: int, remat: str, rows: int, row_tokens: int, rounds: int) -> dict[str, Any]:
    """Both clocks' figures for one case: medians over rounds in which everything has its turn, so that noise troubles all alike."""
    program, batch = setup(model, k, remat, rows, row_tokens)

    def loss(trainable: Any, frozen: Any, batch: Batch) -> Any:
        return sums(program.objective, trainable, frozen, jax.tree.map(lambda a: a[0], batch), None)[0]

    forward, both = jax.jit(lambda *operands: saved(loss, *operands)), jax.jit(jax.grad(loss))
    figures: dict[str, list[float]] = defaultdict(list)
    attributed = []
    for _ in range(rounds):
        jax.block_until_ready(program.step(batch))  # not timed: it finds memory that the other programs have just given back
        b = traced(program, batch)
        figures_now = {f"traced {name}": time for name, time in b.phases.items()} | {"traced step": b.step_seconds}
        figures_now["step"] = seconds(lambda: (program.step(batch), program.state))
        for name, function in (("forward", forward), ("both", both)):
            operands = program.state.trainable, program.frozen, batch
            seconds(function, *operands)
            figures_now[name] = seconds(function, *operands)
        attributed.append(b.attributed)
        for name, value in figures_now.items():
            figures[name].append(value)
    median = {name: statistics.median(values) for name, values in figures.items()}
    pairs = {
        "forward": (median["traced forward"], median["forward"]),
        "forward_and_backward": (sum(median[f"traced {p}"] for p in ("forward", "recompute", "backward")), median["both"]),
        "step": (median["traced step"], median["step"]),
    }
    return {
        "model": model, "k": k, "remat": remat, "rows": rows, "row_tokens": row_tokens, "rounds": rounds,
        "attributed": min(attributed), "seconds": dict(figures),
    } | {name: {"breakdown": ours, "alone": alone, "ratio": ours / alone} for name, (ours, alone) in pairs.items()}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(STUDY_MODELS), default="mixtral")
    parser.add_argument("--remat", choices=("full", "none"), default=None, help="only this policy")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = []
    for remat in (options.remat,) if options.remat else ("full", "none"):
        for k in (2, 8):
            r = check(options.model, k, remat, options.rows, options.seq_len, options.rounds)
            results.append(r)
            print(f"{options.model}, k = {k}, remat {remat}: {100 * r['attributed']:.1f} % of busy time under a named stage")
            for what in ("forward", "forward_and_backward", "step"):
                ours, alone, ratio = (r[what][key] for key in ("breakdown", "alone", "ratio"))
                print(f"  {what:21} breakdown {1e3 * ours:8.1f} ms   alone {1e3 * alone:8.1f} ms   ratio {ratio:.2f}", flush=True)
    kept.write(options.out, kept.about(cores=os.cpu_count(), results=results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
