"""A layer of many small experts beside one of few large ones, on this device: seconds per useful FLOP, forward and backward.

    python benchmarks/small_experts.py                            # 128 experts of 192, 8 a token, beside 8 of 1024, 2 a token
    python benchmarks/small_experts.py --backends auto,loop --json

The model's own layer, router included: frozen experts in NF4, rank-16 adapters on them, hidden rows recomputed, fp32. The two take turns,
so that both meet the same noise; useful are three products a row forward and three backward. The ratio's bar is 2.0.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
from clock import in_turn
from flax import nnx

from moejax.models.build import build
from moejax.models.config import PRESETS, LoRAConfig, Quantization
from moejax.models.layers import scannable

SMALL, LARGE = (128, 8, 192), (8, 2, 1024)  # experts, of them a token, hidden


def layer(shape: tuple[int, int, int], width: int, tokens: int, backend: str) -> Any:
    """A call without arguments that runs the experts' half of a block forward and backward: y, dx and the adapters' gradients."""
    e, k, f = shape
    config = PRESETS["mixtral-tiny"].replace(
        hidden_size=width, intermediate_size=f, num_experts=e, experts_per_token=k, num_layers=1, vocab_size=8
    )
    adapter, quantization = LoRAConfig(16, targets=("w1", "w2", "w3")), Quantization(modules=("experts",))
    model = build(config, key=jax.random.key(0), adapter=adapter, quantization=quantization, dtype=jnp.float32, backend=backend)
    graphdef, trained, frozen = nnx.split(model, nnx.Param, ...)
    x = jax.random.normal(jax.random.key(1), (tokens, width))

    def run(x: jax.Array, dy: jax.Array, trained: Any, frozen: Any) -> Any:
        def moe(x: jax.Array, trained: Any) -> jax.Array:
            state, layer_of = scannable(nnx.merge(graphdef, trained, frozen).layers)
            block = layer_of(jax.tree.map(lambda a: a[0], state), jnp.int32(0))
            return block.moe(x, jnp.ones(tokens, bool))[0]

        y, pull = jax.vjp(moe, x, trained)
        return y, pull(dy)

    compiled = jax.jit(run)
    return lambda: compiled(x, jnp.ones_like(x), trained, frozen)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--backends", default="auto", help="comma-separated: auto, loop, capacity, ragged")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    o = parser.parse_args()
    found = {}
    for backend in o.backends.split(","):
        calls = {shape: layer(shape, o.width, o.tokens, backend) for shape in (SMALL, LARGE)}
        medians = [statistics.median(seconds) for seconds in in_turn(calls, o.repeat).values()]
        rates = [12 * o.tokens * k * o.width * f / s for (_, k, f), s in zip(calls, medians, strict=True)]
        found[backend] = {"seconds": medians, "useful_flops_per_second": rates, "ratio": rates[1] / rates[0]}
        if not o.json:
            small, large = (f"E {e} k {k} F {f} {1e3 * s:.1f} ms" for (e, k, f), s in zip(calls, medians, strict=True))
            print(f"{backend}: {small}, {large}: {rates[1] / rates[0]:.2f} times the seconds per useful FLOP", flush=True)
    if o.json:
        print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
