"""The grouped expert products beside one dense product of the useful size, on this CPU: seconds per useful FLOP, as a ratio.

    python benchmarks/grouped_cpu.py [--tokens 4096 --hidden 512 --intermediate 1024] [--out FILE.json]

Dense: all N·k rows through one expert's three matrices, forward; and backward what frozen weights need (the hidden rows again, the
gradient of what went in). Grouped: the same rows to E experts by a random router, the portable backend as the model calls it, fp32, frozen
weights, no adapter. Skewed: the loads of the study's Figure 11, one expert with three times its share. The three take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from routing import SKEWED, experts_of

from moejax.models.moe import GATED
from moejax.models.ops import grouped_matmul as gm


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, default in (("tokens", 4096), ("hidden", 512), ("intermediate", 1024), ("experts", 8), ("k", 2), ("repeat", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    o = parser.parse_args()
    rng = np.random.default_rng(1)
    n, d, f, e, k = o.tokens, o.hidden, o.intermediate, o.experts, o.k
    w1, w3, w2 = (jnp.asarray(rng.normal(size=s) / 32, jnp.float32) for s in ((e, f, d), (e, f, d), (e, d, f)))
    plan = gm.choose("auto", "cpu", n, e, k)._replace(activation=GATED["silu"])
    gated = GATED["silu"]

    def dense(rows: jax.Array) -> jax.Array:
        @jax.checkpoint
        def body(x: jax.Array) -> jax.Array:
            return gated(x @ w1[0].T, x @ w3[0].T) @ w2[0].T

        return body(rows)

    def grouped(rows: jax.Array, sizes: jax.Array) -> jax.Array:
        ones = jnp.ones(rows.shape[0], rows.dtype)
        inputs = (gm.Projection(w1), gm.Projection(w3))
        return gm.grouped_mlp(plan, rows, ones, sizes, inputs, gm.Projection(w2))

    cases: dict[str, tuple[Any, tuple[Any, ...]]] = {"dense": (dense, (jnp.asarray(rng.normal(size=(n * k, d)), jnp.float32),))}
    x = jnp.asarray(rng.normal(size=(n, d)), jnp.float32)
    for name, loads in (("grouped, uniform", None), ("grouped, skewed", SKEWED)):
        if loads is not None and len(loads) != e:
            continue
        groups = gm.group(jnp.asarray(experts_of(n, e, k, loads)), jnp.ones(n, bool), e, plan.tile)
        cases[name] = (grouped, (gm.dispatch(x, groups), groups.sizes))
    calls: dict[str, dict[str, tuple[Any, tuple[Any, ...]]]] = {}
    for name, (function, (rows, *rest)) in cases.items():
        gradient = jax.jit(lambda dy, x, *rest, function=function: jax.vjp(lambda r: function(r, *rest), x)[1](dy))
        dy = jnp.ones((rows.shape[0], d))
        calls[name] = {"forward": (jax.jit(function), (rows, *rest)), "forward and backward": (gradient, (dy, rows, *rest))}
    seconds: dict[str, dict[str, list[float]]] = {name: {what: [] for what in parts} for name, parts in calls.items()}
    for turn in range(o.repeat + 2):
        for name, parts in calls.items():
            for what, (call, operands) in parts.items():
                start = time.perf_counter()
                jax.block_until_ready(call(*operands))
                if turn > 1:
                    seconds[name][what].append(time.perf_counter() - start)
    medians = {name: {what: statistics.median(v) for what, v in parts.items()} for name, parts in seconds.items()}
    for name, median in medians.items():
        told = ", ".join(f"{what} {1e3 * v:.1f} ms ({v / medians['dense'][what]:.2f})" for what, v in median.items())
        print(f"{name}: {told}")
    if o.out:
        versions = {"jax": jax.__version__, "python": sys.version.split()[0]}
        result = {"command": " ".join(["python benchmarks/grouped_cpu.py", *sys.argv[1:]]), "versions": versions, "cores": os.cpu_count()}
        result |= {"plan": {"backend": plan.backend, "tile": plan.tile, "small_tile": plan.small_tile}, "seconds": seconds}
        o.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
