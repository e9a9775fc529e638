"""Time the real train step with random weights made on the device, for a list of cases; JSON out.

Mixtral-8x7B: NF4 codes, LoRA on experts and routers. BlackMamba-2.8B: full fine-tuning in the study's bf16.

    python benchmarks/gpu_step.py --out benchmarks/results/2026-11-24-gpu-step.json
    python benchmarks/gpu_step.py --cases 8x512:2,32x512:2,1x128:2,8x512:8 --routing uniform,skewed
    python benchmarks/gpu_step.py --model blackmamba --cases 1x128:2,8x512:2,16x512:8
    python benchmarks/gpu_step.py --tiny                     # the same on a CPU, in seconds

`--trace`: one more step of each case under jax's profiler, by phase and stage; all steps are then without CUDA graphs, as traces want it.
A case is ROWSxLENGTH:K. `uniform` routes as random weights do; `skewed` biases the routers towards `SKEW`: one expert far above its
share, the kind of imbalance of the study's figure 11. The share that came of it is in the result.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.92")
sys.path.insert(0, str(Path(__file__).parent.parent))

import breakdown_check
import jax
import jax.numpy as jnp
import kept
import numpy as np
from clock import matrix_rate

from moejax import config as experiments
from moejax import device as machine
from moejax.data.batching import assemble, stack
from moejax.data.tokenize import Query
from moejax.hub.model import adapter_config
from moejax.models.config import PRESETS, Architecture
from moejax.training import flops
from moejax.training.program import TrainProgram

SKEW = (0.26, 0.19, 0.14, 0.12, 0.10, 0.08, 0.06, 0.05)
MODELS = {
    "mixtral": ("mixtral_8x7b_cs_sparse.yaml", "mixtral-8x7b", "mixtral-tiny"),
    "blackmamba": ("blackmamba_2.8b_cs_sparse.yaml", "blackmamba-2.8b", "blackmamba-tiny"),
}
QUERY_TOKENS = 104  # mean length of a commonsense query with Mixtral's tokenizer


def make_batch(rows: int, length: int, batching: str, vocabulary: int) -> Any:
    """`fixed`: one query fills a row. `pack`: rows filled with queries of about QUERY_TOKENS tokens, a third of them answer."""
    rng = np.random.default_rng(0)
    size = length if batching == "fixed" else min(QUERY_TOKENS, length)
    per_row = length // size
    prompt = 0 if batching == "fixed" else 2 * size // 3
    queries = [[Query.after(prompt, rng.integers(0, vocabulary, size).astype(np.int32)) for _ in range(per_row)] for _ in range(rows)]
    return stack([assemble(queries, rows, length)], 1), rows * per_row


def skew(model: Any) -> None:
    """Bias every router towards SKEW. A BlackMamba's router has a bias for it. For a Mixtral embeddings get a common mean, and the
    router's adapter turns that mean into one logit per expert.

    What comes of it is reported (`largest_expert_share`): deeper layers mix the mean away in part.
    """
    offsets = jnp.log(jnp.asarray(SKEW)) - jnp.mean(jnp.log(jnp.asarray(SKEW)))
    router = model.layers.moe.router
    if router.bias is not None:
        bias = router.bias.get_value()
        router.bias.set_value(jnp.broadcast_to(offsets[: bias.shape[-1]], bias.shape).astype(bias.dtype))
        return
    embed = model.embed.weight
    embed.set_value((embed.get_value().astype(jnp.float32) + 0.03).astype(embed.get_value().dtype))
    lora = router.lora
    a, b = lora.a.get_value(), lora.b.get_value()
    lora.a.set_value(a.at[..., 0, :].set(1.0 / a.shape[-1]))
    lora.b.set_value(b.at[..., :, 0].set(offsets[: b.shape[-2]]))


def bytes_in_use(peak: bool = False) -> int | None:
    """By the allocator, now or at most so far; None where it does not say (a CPU)."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use" if peak else "bytes_in_use")


def traced(program: TrainProgram, batch: Any) -> dict[str, Any]:
    """Where the time of one step goes, in seconds."""
    b = breakdown_check.traced(program, batch)
    return {
        "step_seconds": b.step_seconds, "busy_seconds": b.busy_seconds, "attributed": b.attributed, "phases": b.phases,
        "stages": b.sums("stage"), "unnamed": b.unnamed[:5],
    }  # fmt: skip


def run_case(
    experiment: Any, config: Architecture, rows: int, length: int, batching: str, routing: str, steps: int, trace: bool = False
) -> dict[str, Any]:
    """Compile, run and time one case."""
    program = TrainProgram(experiment, config, traced=trace)
    program.load_random()
    if routing == "skewed":
        model = program.model()
        skew(model)
        program.load(model)
    batch, queries = make_batch(rows, length, batching, config.vocab_size)
    batch = jax.device_put(batch)
    program.compile(rows, length)
    before = {"bytes_before": bytes_in_use(), "peak_bytes_before": bytes_in_use(peak=True)}  # random weights may take more than a step
    seconds = []
    for _ in range(steps + 2):
        took, metrics = program.timed(batch)
        seconds.append(took)
    seconds = seconds[2:]
    median = statistics.median(seconds)
    counts = np.asarray(metrics["expert_counts"])
    lengths = [length] * rows if batching == "fixed" else [min(QUERY_TOKENS, length)] * queries
    model_flops = flops.count(config, adapter_config(experiment)).step(sum(lengths), flops.visible_pairs(lengths))
    peak, source = machine.peak_flops(experiment.training.compute_dtype)
    measured = before | {"measured_peak_bytes": bytes_in_use(peak=True)}
    return {
        "rows": rows,
        "row_tokens": length,
        "experts_per_token": config.experts_per_token,
        "batching": batching,
        "routing": routing,
        "largest_expert_share": float((counts.max(axis=1) / counts.sum(axis=1)).mean()),
        "compile_seconds": program.compile_seconds,
        "step_seconds": {"median": median, "all": seconds},
        "tokens_per_second": sum(lengths) / median,
        "queries_per_second": queries / median,
        "model_flop_utilization": model_flops / median / peak,
        "peak_flops": {"value": peak, "source": source},
        "compiler_peak_bytes": program.peak_bytes,
        **measured,
        "loss": float(metrics["loss"]),
        **({"trace": traced(program, batch)} if trace else {}),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", help="default: 1x128:2,8x512:2,32x512:2,96x512:2,8x512:8,32x512:8")
    parser.add_argument("--batching", default="fixed", help="comma-separated: fixed, pack")
    parser.add_argument("--routing", default="uniform", help="comma-separated: uniform, skewed")
    parser.add_argument("--model", choices=sorted(MODELS), default="mixtral")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--trace", action="store_true", help="one more step, under the profiler")
    parser.add_argument("--tiny", action="store_true", help="a small model, for a CPU")
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", help="key.sub=value of the model's commonsense config")
    options = parser.parse_args()
    config_file, preset, tiny = MODELS[options.model]
    experiment = experiments.load(Path(__file__).parent.parent / "configs" / config_file, options.overrides)
    base = PRESETS[tiny if options.tiny else preset]
    cases = options.cases or ("2x32:2,2x32:8" if options.tiny else "1x128:2,8x512:2,32x512:2,96x512:2,8x512:8,32x512:8")
    device = jax.local_devices()[0]
    rate = matrix_rate(512 if options.tiny else 8192, jnp.bfloat16)
    report = kept.about(device=device.device_kind, matrix_rate_flops=rate, cases=[])
    for batching in options.batching.split(","):
        for routing in options.routing.split(","):
            for case in cases.split(","):
                shape, k = case.split(":")
                rows, length = (int(n) for n in shape.split("x"))
                try:
                    sizes = base.replace(experts_per_token=int(k))
                    row = run_case(experiment, sizes, rows, length, batching, routing, options.steps, options.trace)
                except jax.errors.JaxRuntimeError as error:  # out of memory in one cell: the others go on
                    row = {"rows": rows, "row_tokens": length, "experts_per_token": int(k), "error": str(error)[:300]}
                report["cases"].append(row)
                print(json.dumps(row), flush=True)
                kept.write(options.out, report)
    return int(any("error" in case for case in report["cases"]))


if __name__ == "__main__":
    sys.exit(main())
