"""One training step here and in PyTorch, in turn, on this machine: `make bench`.

    python benchmarks/cpu_step.py [--only CASE …] [--reference4 PYTHON] [--reference5 PYTHON] [--out FILE.json]

mixtral: a LoRA step; 8 layers, D 512, F 1024, E 8, k 2, 2048 tokens, LoRA rank 16 on experts and router, beside transformers and PEFT.
qwen3_moe, olmoe: of 4 layers, D 512, and the family's many small experts, k 8, with adapters on experts (rank 4) and attention (16);
"shared A": w1 and w3 have one A, as transformers 5 trains them. blackmamba: a step of full fine-tuning as
configs/bench_blackmamba_tiny.yaml has it, beside plain PyTorch. All in fp32, every layer recomputed in both, from the same weights on the
same batch. The two frameworks take turns, a step each, so that a noisy machine troubles
both alike; the ratio of the medians is the result. The table has the columns of benchmarks/gpu_frameworks.py. "Peak memory" is the
compiler's for moejax's step, and what the whole process held for PyTorch: not the same thing. No side looks for a best batch of its own
here: a CPU's memory is the machine's, and full means swapping.
"""

from __future__ import annotations

import argparse
import json
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
import torch_run
import turns
from gpu_frameworks import FORMULA, model_flops, rate_cell, table

from moejax import config as configuration
from moejax.device import cpu_name
from moejax.errors import UserError


def _lora(**sizes: int) -> list[str]:
    """Overrides for a LoRA step of these sizes."""
    sizes = {"hidden_size": 512, "num_heads": 8, "head_dim": 64, "vocab_size": 2048} | sizes
    rows = ("data.row_tokens=512", "data.max_length=512", "data.batch_rows=4")
    return ["quantization.format=none", f"model.overrides={json.dumps(sizes)}", *rows]


MIXTRAL = _lora(intermediate_size=1024, num_layers=8, num_kv_heads=4)
QWEN3 = _lora(intermediate_size=192, num_layers=4, num_kv_heads=4, num_experts=128, experts_per_token=8)
OLMOE = _lora(intermediate_size=256, num_layers=4, num_kv_heads=8, num_experts=64, experts_per_token=8)
SHARED = "adapter.share=[w1,w3]"
CASES = {
    "mixtral": ("bench_mixtral_tiny.yaml", "study", MIXTRAL),
    "blackmamba": ("bench_blackmamba_tiny.yaml", "plain", []),
    "qwen3_moe": ("bench_qwen3_moe_tiny.yaml", "study", QWEN3),
    "qwen3_moe, shared A": ("bench_qwen3_moe_tiny.yaml", "today", [*QWEN3, SHARED]),
    "olmoe": ("bench_olmoe_tiny.yaml", "study", OLMOE),
    "olmoe, shared A": ("bench_olmoe_tiny.yaml", "today", [*OLMOE, SHARED]),
}
"""Name: config, stack of PyTorch, overrides."""


def compare(name: str, python: Path, steps: int) -> dict[str, Any]:
    """Both sides of one case."""
    config, stack, overrides = CASES[name]
    path, overrides = HERE.parent / "configs" / config, [*overrides, "training.steps=2"]
    experiment = configuration.load(path, overrides)
    with tempfile.TemporaryDirectory() as folder:
        handover.write(experiment, Path(folder), stack_name=stack)
        with turns.torch_side(Path(folder), stack, python) as torch, turns.jax_side(path, overrides, ["--peaks"]) as ours:
            abouts = {"moejax": ours.about, "pytorch": torch.about}
            taken = turns.alternate({"moejax": ours, "pytorch": torch}, steps)
    rows, length, work = experiment.data.batch_rows, experiment.data.longest_row, model_flops(experiment)
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
    torch_run.add_references(parser)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = kept.about("make bench", device=cpu_name(), cases={})
    try:
        pythons = torch_run.references(options, {CASES[case][1] for case in options.only})
        for case in options.only:
            found = result["cases"][case] = compare(case, pythons[CASES[case][1]], options.steps)
            print(f"{case}: moejax is {found['speedup']:.2f} times as fast", flush=True)
            kept.write(options.out, result)
    except (UserError, turns.Stopped) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{table(result)}\n\n{FORMULA}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
