"""One training step here and in PyTorch, in turn, on this machine: `make bench`.

    python benchmarks/cpu_step.py --reference .venv-reference4/bin/python [--out FILE.json]

mixtral: a LoRA step; 8 layers, D 512, F 1024, E 8, k 2, 2048 tokens, LoRA rank 16 on experts and router, beside transformers and PEFT.
blackmamba: a step of full fine-tuning as configs/bench_blackmamba_tiny.yaml has it, beside plain PyTorch. Both in fp32, every layer
recomputed in both. The two frameworks take turns, a step each, so that a noisy machine troubles both alike; the ratio of the medians is the
result. The table has the columns of benchmarks/gpu_frameworks.py. "Peak memory" is the compiler's for moejax's step, and what the whole
process held for PyTorch: not the same thing. No side looks for a best batch of its own here: a CPU's memory is the
machine's, and full means swapping.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import handover
import jax
import jax.numpy as jnp
import kept
import numpy as np
import optax
import turns
from gpu_frameworks import FORMULA, rate_cell, table
from gpu_step import matrix_rate

from moejax import config as configuration
from moejax.data.batch import Batch
from moejax.device import cpu_name
from moejax.hub.model import architecture
from moejax.models.build import build
from moejax.models.config import LoRAConfig, MixtralConfig
from moejax.training import flops, memory
from moejax.training.state import initial_state, split
from moejax.training.step import Objective, make_train_step

LORA_ALPHA = 32.0


def mixtral_config(sizes: dict[str, int]) -> MixtralConfig:
    return MixtralConfig(
        vocab_size=sizes["vocab"],
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["intermediate"],
        num_layers=sizes["layers"],
        num_heads=sizes["heads"],
        num_kv_heads=sizes["kv_heads"],
        head_dim=sizes["hidden"] // sizes["heads"],
        num_experts=sizes["experts"],
        experts_per_token=sizes["experts_per_token"],
        max_position_embeddings=sizes["row_tokens"],
    )


def make_step(sizes: dict[str, int]) -> tuple[Any, dict[str, Any]]:
    """A function that runs one step and returns its seconds and loss; and what is known of the compiled step."""
    adapter = LoRAConfig(rank=sizes["lora_rank"], alpha=LORA_ALPHA)
    model = build(mixtral_config(sizes), key=jax.random.key(0), adapter=adapter, dtype=jnp.float32)
    graphdef, trainable, frozen = split(model, full=False)
    schedule = optax.constant_schedule(1e-4)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.0))
    objective = Objective(graphdef, full=False, remat="full")
    step = jax.jit(make_train_step(objective, optimizer, schedule, 0), donate_argnums=(0,))
    shape = (1, sizes["rows"], sizes["row_tokens"])
    tokens = np.random.default_rng(0).integers(0, sizes["vocab"], shape).astype(np.int32)
    mask = np.ones(shape, np.float32)
    mask[..., -1] = 0
    positions = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
    batch = jax.device_put(Batch(tokens, np.roll(tokens, -1, -1), mask, np.ones(shape, np.int32), positions))
    state = initial_state(trainable, optimizer)
    start = time.perf_counter()
    compiled = step.lower(state, frozen, batch).compile()
    about = {"compile_seconds": time.perf_counter() - start, "compiler_peak_bytes": memory.compiler_peak_bytes(compiled)}

    def run() -> dict[str, float]:
        nonlocal state
        start = time.perf_counter()
        state, metrics = compiled(state, frozen, batch)
        loss = float(metrics["loss"])
        return {"step_seconds": time.perf_counter() - start, "loss": loss}

    return run, about


def mixtral(reference: Path, steps: int) -> dict[str, Any]:
    """A LoRA step beside transformers 4 and PEFT."""
    command = [str(reference), str(HERE / "pytorch" / "mixtral_lora_step.py"), "--serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None

        def torch_step() -> dict[str, float]:
            server.stdin.write("step\n")  # type: ignore[union-attr]
            server.stdin.flush()  # type: ignore[union-attr]
            return json.loads(server.stdout.readline())  # type: ignore[union-attr]

        about = json.loads(server.stdout.readline())
        sizes = about["sizes"]
        rate = matrix_rate(1024, "float32")
        jax_step, ours_about = make_step(sizes)
        pairs = [(jax_step(), torch_step()) for _ in range(steps + 2)][2:]
        server.stdin.close()
    size = {"queries": sizes["rows"], "real_tokens": sizes["rows"] * sizes["row_tokens"]}
    taken = {name: [p[i] | size for p in pairs] for i, name in enumerate(("moejax", "pytorch"))}
    count = flops.count(mixtral_config(sizes), LoRAConfig(rank=sizes["lora_rank"], alpha=LORA_ALPHA))
    work = count.step(size["real_tokens"], flops.visible_pairs([sizes["row_tokens"]] * sizes["rows"]))
    shape = {"rows": sizes["rows"], "row_tokens": sizes["row_tokens"]}
    abouts = {"moejax": ours_about, "pytorch": {}}
    return {"sizes": sizes, "versions": about["versions"]} | shape | _sides(taken, abouts, shape["rows"], work, rate)


def blackmamba(reference: Path, steps: int) -> dict[str, Any]:
    """A step of full fine-tuning beside plain PyTorch."""
    path = HERE.parent / "configs" / "bench_blackmamba_tiny.yaml"
    experiment = configuration.load(path, ["training.steps=2"])
    with tempfile.TemporaryDirectory() as folder:
        handover.write(experiment, Path(folder), stack_name="plain")
        with turns.torch_side(Path(folder), "plain", reference) as torch, turns.jax_side(path, [], ["--peaks"]) as ours:
            abouts = {"moejax": ours.about, "pytorch": torch.about}
            taken = turns.alternate({"moejax": ours, "pytorch": torch}, steps)
    d = experiment.data
    count = flops.count(architecture(experiment, None), None)
    work = count.step(taken["moejax"][0]["real_tokens"], 0)  # no attention: no pairs
    shape = {"rows": d.batch_rows, "row_tokens": d.longest_row}
    result = _sides(taken, abouts, d.batch_rows, work, ours.about["matrix_rate_flops"])
    return {"config": f"configs/{path.name}", "versions": abouts["pytorch"]["versions"]} | shape | result


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


CASES = {"mixtral": mixtral, "blackmamba": blackmamba}


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
        found = result["cases"][case] = CASES[case](options.reference, options.steps)
        print(f"{case}: moejax is {found['speedup']:.2f} times as fast", flush=True)
        kept.write(options.out, result)
    print(f"\n{table(result)}\n\n{FORMULA}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
