"""One training step here and in PyTorch, in turn, on this machine: `make bench`.

    python benchmarks/cpu_step.py --reference .venv-reference4/bin/python [--out FILE.json]

mixtral: a LoRA step; 8 layers, D 512, F 1024, E 8, k 2, 2048 tokens, LoRA rank 16 on experts and router, beside transformers and PEFT.
blackmamba: a step of full fine-tuning as configs/bench_blackmamba_tiny.yaml has it, beside plain PyTorch. Both in fp32, every layer
recomputed in both. The two frameworks take turns, a step each, so that a noisy machine troubles both alike; the ratio of the medians is the
result.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import jax
import jax.numpy as jnp
import numpy as np
import optax

from models.build import build
from models.config import LoRAConfig, MixtralConfig
from moejax.data.batch import Batch
from moejax.training.state import initial_state, split
from moejax.training.step import Objective, make_train_step
from moejax.training.step_profile import cpu_name


def make_step(sizes: dict[str, int]) -> Any:
    """A function that runs one step and returns its seconds and loss."""
    config = MixtralConfig(
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
    model = build(config, key=jax.random.key(0), adapter=LoRAConfig(rank=sizes["lora_rank"], alpha=32.0), dtype=jnp.float32)
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

    def run() -> dict[str, float]:
        nonlocal state
        start = time.perf_counter()
        state, metrics = step(state, frozen, batch)
        loss = float(metrics["loss"])
        return {"step_seconds": time.perf_counter() - start, "loss": loss}

    return run


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
        jax_step = make_step(about["sizes"])
        pairs = [(jax_step(), torch_step()) for _ in range(steps + 2)][2:]
        server.stdin.close()
    ours, theirs = ([p[i]["step_seconds"] for p in pairs] for i in (0, 1))
    tokens = about["sizes"]["rows"] * about["sizes"]["row_tokens"]
    return {"sizes": about["sizes"], "versions": about["versions"]} | _sides(ours, theirs, tokens)


def blackmamba(reference: Path, steps: int) -> dict[str, Any]:
    """A step of full fine-tuning beside plain PyTorch."""
    import handover
    import turns

    from moejax import config as configuration

    path = HERE.parent / "configs" / "bench_blackmamba_tiny.yaml"
    experiment = configuration.load(path, ["training.steps=2"])
    with tempfile.TemporaryDirectory() as folder:
        handover.write(experiment, Path(folder), stack_name="plain")
        with turns.torch_side(Path(folder), "plain", reference) as torch, turns.jax_side(path, []) as ours:
            about = torch.about
            taken = turns.alternate({"moejax": ours, "pytorch": torch}, steps)
    seconds = {name: [step["step_seconds"] for step in side] for name, side in taken.items()}
    result = _sides(seconds["moejax"], seconds["pytorch"], taken["moejax"][0]["real_tokens"])
    return {"config": f"configs/{path.name}", "versions": about["versions"]} | result


def _sides(ours: list[float], theirs: list[float], tokens: int) -> dict[str, Any]:
    medians = {"moejax_median": statistics.median(ours), "pytorch_median": statistics.median(theirs)}
    speedup = medians["pytorch_median"] / medians["moejax_median"]
    return {"tokens": tokens, "moejax_step_seconds": ours, "pytorch_step_seconds": theirs} | medians | {"speedup": speedup}


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
    result: dict[str, Any] = {
        "command": "make bench",
        "date": time.strftime("%Y-%m-%d"),
        "device": cpu_name(),
        "versions": {"jax": jax.__version__, "python": sys.version.split()[0]},
        "cases": {},
    }
    for case in options.only:
        found = result["cases"][case] = CASES[case](options.reference, options.steps)
        for name in ("moejax", "pytorch"):
            seconds, median = found[f"{name}_step_seconds"], found[f"{name}_median"]
            spread = f"{min(seconds):.3f} to {max(seconds):.3f}"
            print(
                f"{case}: {name:8} {median:.3f} s/step ({spread})  {found['tokens'] / median:.0f} tokens/s  (median of {len(seconds)})"
            )
        print(f"{case}: moejax is {found['speedup']:.2f} times as fast", flush=True)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
