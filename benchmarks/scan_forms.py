"""Time the selective scan's forms, forward and backward, on this CPU, and their temporary memory by the compiler; JSON out.

    python benchmarks/scan_forms.py [--batch 2 --length 1024 --channels 512 --states 16] [--out FILE.json]
    python benchmarks/scan_forms.py --compile-only --batch 16 --length 512 --channels 2944 --chunks 16,32

The forms take turns. `checkpoint` is the chunked form left to automatic differentiation with a rematerialized body: what the custom
gradient is measured against.
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

from moejax.models.ops import selective_scan as ss


def checkpointed(u: jax.Array, dt: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array, chunk: int) -> jax.Array:
    """The chunked scan by `jax.checkpoint`: y only; the length is a multiple of the chunk."""

    @jax.checkpoint
    def body(state: jax.Array, xs: Any) -> tuple[jax.Array, jax.Array]:
        y, state = ss._chunk_forward(False, ss._Chunk(*xs), a.T, state)
        return state, y

    starts = jnp.zeros(u.shape[:2], bool)
    xs = tuple(jnp.swapaxes(v, 0, 1).reshape(-1, chunk, u.shape[0], *v.shape[2:]) for v in (dt * u, dt, b, c, starts))
    _, y = jax.lax.scan(body, jnp.zeros((u.shape[0], *a.T.shape)), xs)
    return jnp.swapaxes(y.reshape(-1, *y.shape[2:]), 0, 1) + d * u


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--states", type=int, default=16)
    parser.add_argument("--chunks", default="16,32,64,128")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--compile-only", action="store_true", help="print temporary memory, run nothing")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    b, t, d, n = options.batch, options.length, options.channels, options.states
    rng = np.random.default_rng(0)
    shapes = [(b, t, d), (b, t, d), (d, n), (b, t, n), (b, t, n), (d,)]
    operands = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]
    operands[1], operands[2] = jax.nn.softplus(operands[1] - 3), -jnp.exp(operands[2])

    def gradient(scan: Any) -> Any:
        return jax.jit(jax.grad(lambda o: jnp.sum(scan(o) ** 2)))

    forms = {"associative": gradient(lambda o: ss.selective_scan(*o, form="associative")[0])}
    for chunk in (int(c) for c in options.chunks.split(",")):
        for form in ("chunked", "chunked_associative"):
            forms[f"{form} {chunk}"] = gradient(lambda o, f=form, c=chunk: ss.selective_scan(*o, form=f, chunk=c)[0])
        forms[f"checkpoint {chunk}"] = gradient(lambda o, c=chunk: checkpointed(*o, chunk=c))
    if options.compile_only:
        for name, form in forms.items():
            print(f"{name:24} {form.lower(operands).compile().memory_analysis().temp_size_in_bytes / 1e9:8.3f} GB")
        return 0
    memory = {k: f.lower(operands).compile().memory_analysis().temp_size_in_bytes for k, f in forms.items()}
    reference = jax.block_until_ready(gradient(lambda o: ss.selective_scan(*o, form="sequential")[0])(operands))
    seconds: dict[str, list[float]] = {k: [] for k in forms}
    for form in forms.values():
        for ours, theirs in zip(jax.block_until_ready(form(operands)), reference, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4 * float(jnp.abs(theirs).max()))
    for _ in range(options.repeat):
        for name, form in forms.items():
            start = time.perf_counter()
            jax.block_until_ready(form(operands))
            seconds[name].append(time.perf_counter() - start)
    medians = {k: statistics.median(v) for k, v in seconds.items()}
    for name in forms:
        ratio = medians["associative"] / medians[name]
        print(f"{name:24} {1e3 * medians[name]:8.1f} ms  {ratio:5.2f} x  {memory[name] / 1e6:9.1f} MB")
    if options.out:
        sizes = {"batch": b, "length": t, "channels": d, "states": n}
        result = {"what": "selective scan, forward + backward", "date": time.strftime("%Y-%m-%d"), "sizes": sizes}
        result |= {"cores": os.cpu_count(), "jax": jax.__version__, "seconds": seconds, "temporary_bytes": memory}
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
