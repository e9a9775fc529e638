"""Measure the grouped matmul's backends and tiles on this device, and write the fastest into models/ops/choice.json.

    python benchmarks/grouped_choice.py --out benchmarks/results/<date>-grouped-choice-<device>.json --update   # the shapes of this device
    python benchmarks/grouped_choice.py --shapes 4096x512x1024 --storage array --dtype float32                  # only look
    python benchmarks/grouped_choice.py --tiny                                                                  # a small one, in seconds

A shape is TOKENSxHIDDENxINTERMEDIATE, 8 experts, k = 2, or TOKENSxHIDDENxINTERMEDIATExEXPERTSxK. Each candidate runs forward and backward
(frozen weights, rank-16 adapters on all projections, hidden rows recomputed) under a uniform and a skewed routing (loads of the study's
Figure 11: one expert with three times its share); the sum of the two medians decides, and the loop is beaten only by more than `MARGIN`.
Candidates take turns, so that all meet the same noise. Next to each time: the rate of useful FLOPs, and of one dense product of the same
useful size; next to each candidate: the largest difference of output and gradients from the loop in fp32.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.92")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import choices
import jax
import jax.numpy as jnp
import kept
import numpy as np
from clock import difference, in_turn

from moejax.models.moe import GATED
from moejax.models.ops import choice, quantized
from moejax.models.ops.grouped import matmul as gm

RANK = 16
MARGIN = 1.15
"""By how much another backend must beat the loop: `capacity` costs memory."""
SHAPES = {
    "cpu": "4096x512x1024,1280x256x512,512x256x512,2048x384x256x128x8",
    "gpu": "128x4096x14336,4096x4096x14336,16384x4096x14336,4096x2048x5632,4096x2048x768x128x8",
}
TILES = {
    "cpu": ((64, 32), (128, 32), (256, 32), (256, 64)),
    "gpu": ((128, 64), (256, 64), (512, 64), (512, 128), (1024, 128)),
}
# The study's Figure 11: one expert in eight with three times its share.
SKEWED = (0.375, 0.15, 0.125, 0.1, 0.1, 0.075, 0.05, 0.025)


def experts_of(tokens: int, experts: int, k: int, loads: tuple[float, ...] | None) -> np.ndarray:
    """int32 [N, K]: k different experts a token, drawn by these loads."""
    rng = np.random.default_rng(0)
    weights = np.ones(experts) / experts if loads is None else np.repeat(loads, experts // len(loads))
    noise = np.log(weights) + rng.gumbel(size=(tokens, experts))
    return np.argsort(-noise, axis=1)[:, :k].astype(np.int32)


def sizes(shape: str) -> tuple[int, int, int, int, int]:
    """Tokens, hidden, intermediate, experts, k."""
    tokens, d, f, *rest = (int(n) for n in shape.split("x"))
    experts, k = rest or (8, 2)
    return tokens, d, f, experts, k


def projections(experts: int, d: int, f: int, storage: str, dtype: Any) -> tuple[tuple[gm.Projection, ...], gm.Projection]:
    """w1, w3 and w2 with adapters; codes are random bits, made on the device."""
    keys = iter(jax.random.split(jax.random.key(0), 12))

    def weight(o: int, i: int) -> Any:
        if storage == "array":
            return (0.02 * jax.random.normal(next(keys), (experts, o, i))).astype(dtype)
        return quantized.abstract(storage, (experts, o, i)).random(next(keys))

    def projection(o: int, i: int) -> gm.Projection:
        a, b = (0.02 * jax.random.normal(next(keys), s) for s in ((experts, RANK, i), (experts, o, RANK)))
        return gm.Projection(weight(o, i), gm.LoRAWeights(a, b))

    return (projection(f, d), projection(f, d)), projection(d, f)


def step(plan: gm.Plan, inputs: Any, output: Any) -> Any:
    """jitted: tokens' rows x, dy, groups -> y, dx, and the adapters' gradients. The weights are arguments, not constants of the program."""

    def run(x: jax.Array, dy: jax.Array, groups: gm.Groups, inputs: Any, output: Any) -> Any:
        def f(x: jax.Array, loras: Any) -> jax.Array:
            *ins, out = (p._replace(lora=lora) for p, lora in zip((*inputs, output), loras, strict=True))
            return gm.grouped_mlp(plan, x, jnp.ones(groups.choice.shape, x.dtype), groups, tuple(ins), out)

        y, pull = jax.vjp(f, x, [p.lora for p in (*inputs, output)])
        return y, *pull(dy)

    compiled = jax.jit(run)
    return lambda x, dy, groups: compiled(x, dy, groups, inputs, output)


def dense(d: int, f: int, rows: int, dtype: Any) -> Any:
    """One product of the useful size and its backward pass, hidden rows recomputed: what no grouping can beat by FLOPs."""
    keys = jax.random.split(jax.random.key(1), 3)
    w1, w3, w2 = ((0.02 * jax.random.normal(k, s)).astype(dtype) for k, s in zip(keys, ((f, d), (f, d), (d, f)), strict=True))

    def run(x: jax.Array, dy: jax.Array, w1: jax.Array, w3: jax.Array, w2: jax.Array) -> Any:
        y, pull = jax.vjp(jax.checkpoint(lambda x: GATED["silu"](x @ w1.T, x @ w3.T) @ w2.T), x)
        return y, *pull(dy)

    compiled, x = jax.jit(run), jnp.ones((rows, d), dtype)
    return lambda: compiled(x, x, w1, w3, w2)


def candidates(platform: str, shape: str, in_4_bits: bool) -> dict[str, gm.Plan]:
    tokens, d, f, experts, k = sizes(shape)
    base = gm.choose("auto", "", tokens, experts, k, hidden=d, intermediate=f, quantized=in_4_bits)._replace(activation=GATED["silu"])
    rows = tokens * k // experts
    tiles = {(min(t, max(8, rows // 2)), min(s, max(8, rows // 2))) for t, s in TILES[platform]}
    if experts >= choice.MANY_EXPERTS:  # also one product an expert, or nearly so
        tiles |= {(max(8, rows * eighths // 8), max(8, rows // 4)) for eighths in (8, 9, 10, 12)}
    plans = {f"loop {t}/{s}": base._replace(backend="loop", tile=t, small_tile=s) for t, s in sorted(tiles)}
    return plans | {"capacity": base._replace(backend="capacity")}


def measure(platform: str, shape: str, storage: str, dtype: Any, repeat: int) -> dict[str, Any]:
    """All candidates of one shape: medians by routing, differences, and who won."""
    tokens, d, f, experts, k = sizes(shape)
    weights = projections(experts, d, f, storage, dtype)
    plans, calls, errors = candidates(platform, shape, storage != "array"), {}, {}
    calls["dense"] = dense(d, f, tokens * k, dtype)
    steps = {name: step(plan, *weights) for name, plan in plans.items()}
    for routing, loads in (("uniform", None), ("skewed", SKEWED)):
        choices = jnp.asarray(experts_of(tokens, experts, k, loads))
        reference = None
        for name, plan in plans.items():
            groups = gm.group(choices, jnp.ones(tokens, bool), experts, plan.tile)
            x = jax.random.normal(jax.random.key(2), (tokens, d))
            arguments = (x.astype(dtype), jnp.ones_like(x, dtype), groups)
            try:
                call = steps[name]
                found = call(*arguments)
                if reference is None:
                    fp32 = step(plan, *jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, weights))
                    reference = fp32(x, jnp.ones_like(x), groups)
                errors[f"{name}, {routing}"] = difference(found, reference)
                calls[f"{name}, {routing}"] = lambda call=call, arguments=arguments: call(*arguments)
            except jax.errors.JaxRuntimeError as error:  # out of memory: the others go on
                errors[f"{name}, {routing}"] = str(error)[:200]
    seconds = in_turn(calls, repeat)
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    useful = 6 * 2 * tokens * k * d * f  # three products a row forward, three backward; recomputation and adapters are not counted
    winner, entry = decide(plans, medians)
    entry = {"rows_per_expert": tokens * k // experts, "hidden": d, "intermediate": f, "quantized": storage != "array"} | entry
    return {
        "shape": shape, "storage": storage, "dtype": jnp.dtype(dtype).name, "winner": winner, "entry": entry, "medians": medians,
        "of_dense": {name: s / medians["dense"] for name, s in medians.items()},
        "useful_flops_per_second": {name: useful / s for name, s in medians.items()},
        "difference_from_fp32": errors, "seconds": seconds,
    }  # fmt: skip


def decide(plans: dict[str, gm.Plan], medians: dict[str, float]) -> tuple[str, dict[str, Any]]:
    """The winner's name, and what the table says of it: the backend, and the best loop's tile."""
    both = {
        name: sum(medians[f"{name}, {routing}"] for routing in ("uniform", "skewed"))
        for name in plans
        if f"{name}, skewed" in medians and f"{name}, uniform" in medians
    }
    loop = min((name for name in both if name.startswith("loop")), key=lambda name: both[name])
    winner = "capacity" if both.get("capacity", both[loop]) * MARGIN < both[loop] else loop
    return winner, {"backend": plans[winner].backend, "tile": plans[loop].tile, "small_tile": plans[loop].small_tile}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    platform = "cpu" if jax.default_backend() == "cpu" else "gpu"
    parser.add_argument("--shapes", default=SHAPES[platform], help="comma-separated TOKENSxHIDDENxINTERMEDIATE[xEXPERTSxK]")
    parser.add_argument("--storage", default="array,nf4-double", help="comma-separated: array, nf4, nf4-double")
    o = choices.parsed(parser, "float32" if platform == "cpu" else "bfloat16")
    kind = choice.here()
    result = kept.about(device=kind, cores=os.cpu_count(), cases=[])
    for storage in o.storage.split(","):
        for shape in ("64x32x48" if o.tiny else o.shapes).split(","):
            case = measure(platform, shape, storage, jnp.dtype(o.dtype), 2 if o.tiny else o.repeat)
            result["cases"].append(case)
            print(f"{shape} {storage} {o.dtype}: {case['winner']}")
            for name, median in case["medians"].items():
                rate = case["useful_flops_per_second"][name] / 1e9
                print(f"  {name:<24} {1e3 * median:9.3f} ms, {case['of_dense'][name]:5.2f} of dense, {rate:8.1f} GFLOP/s", flush=True)
            kept.write(o.out, result)
    if o.update:
        choices.update("grouped", kind, [c["entry"] for c in result["cases"]], o.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
