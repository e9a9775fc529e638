"""One training step here and in PyTorch, in turn, on this machine: `make bench`.

    python benchmarks/cpu_step.py --reference .venv-reference4/bin/python [--out FILE.json]

mixtral: a LoRA step; 8 layers, D 512, F 1024, E 8, k 2, 2048 tokens, LoRA rank 16 on experts and router, beside transformers and PEFT.
blackmamba: a step of full fine-tuning as configs/bench_blackmamba_tiny.yaml has it, beside plain PyTorch. Both in fp32, every layer
recomputed in both, from the same weights on the same batch. The two frameworks take turns, a step each, so that a noisy machine troubles
both alike; the ratio of the medians is the result. The table has the columns of benchmarks/gpu_frameworks.py. "Peak memory" is the
compiler's for moejax's step, and what the whole process held for PyTorch: not the same thing. No side looks for a best batch of its own
here: a CPU's memory is the machine's, and full means swapping.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import handover
import kept
import turns
from gpu_frameworks import FORMULA, rate_cell, table

from moejax import config as configuration
from moejax.device import cpu_name
from moejax.hub.model import adapter_config, architecture
from moejax.training import flops

MIXTRAL = [
    "quantization.format=none", "model.overrides={hidden_size: 512, intermediate_size: 1024, num_layers: 8, num_heads: 8, num_kv_heads: 4,"
    " head_dim: 64, vocab_size: 2048}", "data.row_tokens=512", "data.max_length=512", "data.batch_rows=4",
]  # fmt: skip
CASES = {
    "mixtral": ("bench_mixtral_tiny.yaml", "study", MIXTRAL),
    "blackmamba": ("bench_blackmamba_tiny.yaml", "plain", []),
}
"""Name: config, stack of PyTorch, overrides."""


def compare(name: str, reference: Path, steps: int) -> dict[str, Any]:
    """Both sides of one case."""
    config, stack, overrides = CASES[name]
    path, overrides = HERE.parent / "configs" / config, [*overrides, "training.steps=2"]
    experiment = configuration.load(path, overrides)
    with tempfile.TemporaryDirectory() as folder:
        handover.write(experiment, Path(folder), stack_name=stack)
        with turns.torch_side(Path(folder), stack, reference) as torch, turns.jax_side(path, overrides, ["--peaks"]) as ours:
            abouts = {"moejax": ours.about, "pytorch": torch.about}
            taken = turns.alternate({"moejax": ours, "pytorch": torch}, steps)
    rows, length = experiment.data.batch_rows, experiment.data.longest_row
    count = flops.count(architecture(experiment, None), adapter_config(experiment))
    work = count.step(rows * length, flops.visible_pairs([length] * rows))
    about = {"config": f"configs/{config}", "overrides": overrides, "versions": torch.about["versions"], "rows": rows}
    return about | {"row_tokens": length} | _sides(taken, abouts, rows, work, ours.about["matrix_rate_flops"])


def _sides(
    taken: dict[str, list[dict[str, Any]]], abouts: dict[str, dict[str, Any]], rows: int, work: float, rate: float
) -> dict[str, Any]:
    """Both sides' steps, and their cells of the table. work: model FLOPs of a step; rate: of a square product, measured here."""
    cells = {}
    for name, steps in taken.items():
        peak = {key: value for key, value in abouts[name].items() if key == "compiler_peak_bytes"}
        cells[name] = {"rows": rows, "about": abouts[name]} | peak | turns.summary(steps)
        rate_cell(cells[name], work, rate, None)
    medians = {f"{name}_median": cell["median"] for name, cell in cells.items()}
    seconds = {f"{name}_step_seconds": cell["step_seconds"] for name, cell in cells.items()}
    return {"same batch": cells} | seconds | medians | {"speedup": medians["pytorch_median"] / medians["moejax_median"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=Path, required=True, help="Python of the PyTorch environment")
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not options.reference.exists():
        print(f"error: {options.reference} does not exist: make reference4 builds the PyTorch environment", file=sys.stderr)
        return 2
    result = kept.about("make bench", device=cpu_name(), cases={})
    for case in options.only:
        found = result["cases"][case] = compare(case, options.reference, options.steps)
        print(f"{case}: moejax is {found['speedup']:.2f} times as fast", flush=True)
        kept.write(options.out, result)
    print(f"\n{table(result)}\n\n{FORMULA}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
