"""Grouped products of a layer's experts: backends and tiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from moejax import gpus
from moejax.config import Experiment
from moejax.models.config import Architecture
from moejax.models.ops import choice
from moejax.tuner.drawn import Drawn
from moejax.tuner.registry import MARGIN, UNSTABLE_MARGIN, Candidate, Case
from moejax.tuner.shapes import tokens_of

TILES = {"cpu": (32, 64, 128, 256), "gpu": (256, 512, 1024, 2048, 4096), "tpu": (1024, 4096)}
SMALL = {"cpu": (32, 64), "gpu": (64, 128, 256), "tpu": (128,)}
SKEW = (0.375, 0.15, 0.125, 0.1, 0.1, 0.075, 0.05, 0.025)
"""Shares of experts in the study's Figure 11: one in eight has three times its share."""


def shapes(experiment: Experiment, config: Architecture) -> list[dict[str, Any]]:
    if config.experts_per_token in (0, config.num_experts):
        return []
    tokens, t = tokens_of(experiment), experiment.training
    kind = experiment.kinds(config).get("experts")
    lora = None if experiment.adapter is None else experiment.adapter.lora.of(config)
    ranks = [] if lora is None else [pair.rank for target, pair in lora.items() if target in ("w1", "w2", "w3")]
    return [{
        "rows_per_expert": max(1, tokens * config.experts_per_token // config.num_experts), "hidden": config.hidden_size,
        "intermediate": config.intermediate_size, "quantized": kind is not None, "tokens": tokens, "experts": config.num_experts,
        "k": config.experts_per_token, "storage": kind or "array", "rank": max(ranks, default=0), "trained": lora is None,
        "dtype": t.compute_dtype,
    }]  # fmt: skip


def candidates(device: str, shape: dict[str, Any]) -> list[Candidate]:
    """The loop with the tiles that run without a measurement, the loop with others, `capacity`; on a TPU `ragged`, on a GPU `decode`."""
    from moejax.models.ops.grouped import decode

    platform = "cpu" if device == "cpu" else "tpu" if choice.is_tpu(device) else "gpu"
    rows = shape["rows_per_expert"]
    _, tile, small, _ = choice.grouped(
        device, shape["tokens"], shape["experts"], shape["k"], hidden=shape["hidden"], intermediate=shape["intermediate"],
        quantized=shape["quantized"],
    )  # fmt: skip
    pairs = {(t, s) for t in TILES[platform] for s in SMALL[platform] if s <= t <= max(rows // 2, TILES[platform][0])} - {(tile, small)}
    loops = [(tile, small), *sorted(pairs, key=lambda p: (abs(p[0] - tile), abs(p[1] - small)))]
    found = [
        Candidate(f"loop {t}/{s}", {"backend": "loop", "tile": t, "small_tile": s}, best=number < 3) for number, (t, s) in enumerate(loops)
    ]
    others = ["capacity", *["ragged"] * (platform == "tpu"), *["decode"] * (platform == "gpu")]
    why = decode.refusal(device, gpus.capability(device))
    return [
        *found,
        *(
            Candidate(
                name, {"backend": name, "tile": tile, "small_tile": small}, margin=UNSTABLE_MARGIN if name == "decode" else MARGIN,
                why_not=why if name == "decode" else None,
            )
            for name in others
        ),
    ]  # fmt: skip


def plan_of(device: str, shape: dict[str, Any], entry: dict[str, Any]) -> Any:
    """What a run with this entry in its table would do. Raises ValueError where it would not take the entry's backend."""
    from moejax.models.moe import GATED
    from moejax.models.ops.grouped import matmul

    choice.adopt(device, {"grouped": [{name: shape[name] for name in choice.SHAPES["grouped"]} | entry]})
    plan = matmul.choose(
        "auto", device, shape["tokens"], shape["experts"], shape["k"], hidden=shape["hidden"], intermediate=shape["intermediate"],
        quantized=shape["quantized"], item=np.dtype(_dtype(shape)).itemsize, memory_bytes=choice.memory_here(),
    )  # fmt: skip
    if plan.backend != entry["backend"]:
        raise ValueError(f"{entry['backend']} takes too much of this device's memory at this size")
    return plan._replace(activation=GATED["silu"], trainable=shape["trained"])


def _dtype(shape: dict[str, Any]) -> Any:
    import jax.numpy as jnp

    return jnp.dtype(shape["dtype"])


def build(device: str, shape: dict[str, Any], entry: dict[str, Any], options: dict[str, Any] | None = None) -> Any:
    """(token rows, their gradient, choices [N, k], routing weights, projections) -> rows [N, D], and gradients of the rows, the
    weights p and the adapters (or the experts' own weights)."""
    import jax

    from moejax.compiler_options import gpu_options
    from moejax.models.ops.grouped import matmul

    plan = plan_of(device, shape, entry)

    def run(x: Any, dy: Any, choices: Any, weights: Any, inputs: Any, output: Any) -> Any:
        valid = choices[:, 0] < shape["experts"]
        groups = matmul.group(choices, valid, shape["experts"], plan.tile)

        def layer(x: Any, weights: Any, trained: Any) -> Any:
            *ins, out = (
                p._replace(weight=t) if shape["trained"] else p._replace(lora=t) for p, t in zip((*inputs, output), trained, strict=True)
            )
            return matmul.grouped_mlp(plan, x, matmul.sort_weights(weights, groups).astype(x.dtype), groups, tuple(ins), out)

        trained = [p.weight if shape["trained"] else p.lora for p in (*inputs, output)]
        y, pull = jax.vjp(layer, x, weights, trained)
        return y, *pull(dy)

    if options is None and jax.default_backend() == "gpu":
        options = gpu_options()
    return jax.jit(run, compiler_options=options)


def cases(shape: dict[str, Any]) -> Iterator[Case]:
    """Routings: skewed and even (timed); experts without a token, one that takes all, groups that are multiples of nothing, and padding
    tokens whose rows are NaN: they visit no expert, and nothing of theirs may reach a row or a sum."""
    import jax.numpy as jnp

    n, d, experts, k, dtype = shape["tokens"], shape["hidden"], shape["experts"], shape["k"], _dtype(shape)
    drawn = Drawn(0)
    x, dy = drawn.normal(n, d, dtype=dtype), drawn.normal(n, d, dtype=dtype)
    weights = drawn.normal(n, k)
    projections = _projections(shape)
    for name, loads, timed in (
        ("skewed routing", np.resize(SKEW, experts), True),
        ("even routing", np.ones(experts), True),
        ("experts without a token", np.arange(experts) % 3 == 0, False),
        ("one expert takes all", np.arange(experts) == experts - 1, False),
        ("groups that are multiples of nothing", 1 + np.arange(experts) ** 2 % 7, False),
    ):
        yield Case(name, (x, dy, jnp.asarray(routing(n, k, loads)), weights, *projections), timed)
    padding = np.arange(n) >= n - max(1, n // 7)
    ids = np.where(padding[:, None], experts, routing(n, k, np.ones(experts)))
    poisoned, without = (np.where(padding[:, None], put, np.asarray(rows)).astype(dtype) for put, rows in ((np.nan, x), (0, dy)))
    operands = jnp.asarray(poisoned), jnp.asarray(without), jnp.asarray(ids, jnp.int32)
    yield Case("padding rows of NaN", (*operands, weights, *projections))


def routing(tokens: int, k: int, loads: Any) -> np.ndarray:
    """int32 [N, k]: k different experts a token, drawn by these loads; those of no load are taken where there are too few others."""
    shares = np.asarray(loads, np.float64)
    noise = np.log(np.maximum(shares / shares.sum(), 1e-12)) + np.random.default_rng(0).gumbel(size=(tokens, shares.size))
    return np.argsort(-noise, axis=1)[:, :k].astype(np.int32)


def _projections(shape: dict[str, Any]) -> tuple[Any, Any]:
    """w1, w3 and w2 with their adapters."""
    from moejax.models.ops.grouped import matmul

    experts, rank, drawn = shape["experts"], shape["rank"], Drawn(1)

    def projection(out: int, inner: int) -> Any:
        weight = drawn.weight(shape["storage"], experts, out, inner, dtype=_dtype(shape))
        pair = [drawn.normal(*size, scale=0.02) for size in ((experts, rank, inner), (experts, out, rank))] if rank else None
        return matmul.Projection(weight, None if pair is None else matmul.LoRAWeights(*pair))

    d, f = shape["hidden"], shape["intermediate"]
    return (projection(f, d), projection(f, d)), projection(d, f)
