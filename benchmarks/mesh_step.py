"""The work of one step over several devices next to the same step on one: CPU seconds of all threads, for virtual devices of this CPU.

    python benchmarks/mesh_step.py [--devices 4] [--rows 32] [--tokens 192] [--steps 5] [--out FILE]

A mesh adds work where devices do the same thing twice: each dequantizes what it multiplies by, and in mode `experts` sorts the rows of
all. Seconds on the clock say nothing here: the devices share the cores.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from statistics import median

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

MODES = ("whole", "spread", "experts")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--rows", type=int, default=32, help="of all devices together")
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--modes", nargs="*", default=MODES, choices=MODES)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    flag = f"--xla_force_host_platform_device_count={options.devices}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()  # jax reads it when it is imported

    import kept
    import numpy as np

    from moejax import config as configuration
    from moejax.data.batching import assemble, stack, synthetic
    from moejax.training.program import TrainProgram

    def program(mesh: str) -> TrainProgram:
        content = {
            "name": "mesh", "model": {"preset": "mixtral-tiny"}, "quantization": {"format": "nf4"},
            "adapter": {"rank": 4, "targets": ["w1", "w2", "w3", "gate", "q_proj", "k_proj", "v_proj", "o_proj"]},
            "data": {"batching": "fixed", "row_tokens": options.tokens, "max_length": options.tokens, "batch_rows": options.rows},
            "training": {"steps": 100, "compute_dtype": "float32"},
            "mesh": None if mesh == "one device" else {"devices": options.devices, "weights": mesh},
        }  # fmt: skip
        experiment = configuration.of(content, "mesh_step")
        made = TrainProgram(experiment, experiment.model.architecture(None))
        made.load_random()
        return made

    first = program("one device")
    queries = synthetic(first.experiment.data, first.config.vocab_size, 0, options.rows)
    batch = stack([assemble([[q] for q in queries], options.rows, options.tokens)], 1)
    programs = {"one device": first} | {mode: program(mode) for mode in options.modes}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    losses = {name: float(made.step(batch)["loss"]) for name, made in programs.items()}
    for _ in range(options.steps):  # in turn: what else the machine does meets all
        for name, made in programs.items():
            start = time.process_time()
            float(made.step(batch)["loss"])
            seconds[name].append(time.process_time() - start)
    medians = {name: median(taken) for name, taken in seconds.items()}
    work = {name: taken / medians["one device"] for name, taken in medians.items()}
    for name, times in work.items():
        print(f"{name:10}  loss {losses[name]:.6f}  {medians[name]:.3f} CPU s a step  {times:.2f} times one device's")
    assert np.isfinite(list(losses.values())).all()
    kept.write(options.out, kept.about(devices=options.devices, rows=options.rows, row_tokens=options.tokens) | {
        "cpu_seconds": seconds, "times_one_device": work, "first_loss": losses,
    })  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
