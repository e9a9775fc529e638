"""Time the selective scan's forms, forward and backward, for the 2.8B layer at several batch x length; JSON out.

    python benchmarks/gpu_scan.py --out benchmarks/results/<date>-gpu-scan.json
    python benchmarks/gpu_scan.py --tiny                     # the same on a CPU, in seconds

Beside each time: the floor of the bytes that must move (every operand and gradient once, in the compute dtype's bytes, and boundary
states), what of the device's measured copy rate that is, and the largest difference from the sequential reference on the device,
relative to the reference's largest element, over the output and all gradients.
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

os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.92")
sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import kept

from models.ops import selective_scan as ss

CHANNELS, STATES = 2944, 16
# The whole-row associative scan holds several [B, T, D, N] in fp32 at a time: beyond this many elements it is left out.
LARGEST_WHOLE_ROW = 2e9


def operands(b: int, t: int, d: int, n: int, dtype: Any) -> tuple[list[jax.Array], jax.Array]:
    """u, dt, a, b, c, d as a layer makes them, and starts of four segments a row."""
    keys = jax.random.split(jax.random.key(0), 6)
    u, dt, bb, cc = (
        jax.random.normal(k, s, jnp.float32) for k, s in zip(keys, [(b, t, d), (b, t, d), (b, t, n), (b, t, n)], strict=False)
    )
    a = -jnp.broadcast_to(jnp.arange(1, n + 1, dtype=jnp.float32), (d, n))
    dt = jax.nn.softplus(dt - 4)
    starts = jnp.broadcast_to(jnp.arange(t) % max(t // 4, 1) == 0, (b, t))
    return [u.astype(dtype), dt, a, bb.astype(dtype), cc.astype(dtype), jnp.ones(d)], starts


def gradient(form: str, chunk: int | None) -> Any:
    def loss(arguments: list[jax.Array], starts: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = ss.selective_scan(*arguments, starts, form=form, chunk=chunk)[0]
        return jnp.sum(y * weights), y

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def copy_rate(nbytes: int) -> float:
    """Bytes read and written per second by a plain elementwise pass."""
    x = jnp.ones(nbytes // 4, jnp.float32)
    plus = jax.jit(lambda v: v + 1)
    plus(x).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        plus(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * x.nbytes / min(seconds)


def difference(found: Any, expected: Any) -> float:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(jnp.max(jnp.abs(a.astype(jnp.float32) - e.astype(jnp.float32))) / jnp.max(jnp.abs(e))) for a, e in pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", default="1x512,8x512,16x512,4x2048,16x2048")
    parser.add_argument("--chunks", default="16,32,64,128")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="a small layer, for a CPU")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    channels, cases, chunks = (32, "2x64", "16") if options.tiny else (CHANNELS, options.cases, options.chunks)
    rate = copy_rate(1 << 22 if options.tiny else 1 << 30)
    report = kept.about(device=jax.local_devices()[0].device_kind, copy_bytes_per_second=rate, cases=[])
    forms: list[tuple[str, int | None]] = [(f, int(c)) for c in chunks.split(",") for f in ("chunked", "chunked_associative")]
    for case in cases.split(","):
        b, t = (int(n) for n in case.split("x"))
        arguments, starts = operands(b, t, channels, STATES, options.dtype)
        weights = jax.random.normal(jax.random.key(1), (b, t, channels))
        reference = gradient("sequential", None)(arguments, starts, weights)
        # u, dt, B, C in and their gradients out, y out and its gradient in; states at the chunks' starts are few.
        floor = 2 * sum(x.nbytes for x in arguments) + 2 * weights.nbytes
        whole_row: list[tuple[str, int | None]] = [("associative", None)]
        for form, chunk in forms + (whole_row if b * t * channels * STATES <= LARGEST_WHOLE_ROW else []):
            row: dict[str, Any] = {"batch": b, "length": t, "form": form, "chunk": chunk, "dtype": options.dtype}
            try:
                run = gradient(form, chunk)
                row["largest_difference"] = difference(run(arguments, starts, weights), reference)
                seconds = []
                for _ in range(options.steps):
                    start = time.perf_counter()
                    jax.block_until_ready(run(arguments, starts, weights))
                    seconds.append(time.perf_counter() - start)
                memory = run.lower(arguments, starts, weights).compile().memory_analysis()
                row |= {
                    "seconds": {"median": statistics.median(seconds), "all": seconds},
                    "floor_bytes": floor,
                    "floor_seconds": floor / rate,
                    "temporary_bytes": memory.temp_size_in_bytes,
                }
            except jax.errors.JaxRuntimeError as error:  # out of memory in one cell: the others go on
                row["error"] = str(error)[:300]
            report["cases"].append(row)
            print(json.dumps(row), flush=True)
            kept.write(options.out, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
