"""NF4 to bf16 in each layout of the codes, by each look-up: bytes per second, beside a copy of as many.

    python benchmarks/dequant_forms.py --out benchmarks/results/<date>-dequant-<device>.json      # one expert matrix of Mixtral-8x7B
    python benchmarks/dequant_forms.py --shape 512x256 --dtype float32 --out …                   # what `make frameworks` has on a CPU

As the model does it: 8 experts' codes in one stack, one expert's matrix at a time in a loop, each used once, by a product with one
row: it is in the time, and told by itself for matrices that need no dequantization. The bytes are those that must move: half a byte a
weight read, the result written. Forms are measured in turn. What the compiler fuses: tests/models/test_structure.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import kept
from clock import copy_rate, in_turn

from moejax.models.ops import nf4, quantized
from moejax.models.ops.linear import part

EXPERTS = 8
FORMS = {f"{layout}, {name}": (layout, look_up) for layout in quantized.LAYOUTS for name, look_up in nf4.LOOK_UPS.items()}


def dequantized(form: str, weight: Any, dtype: Any) -> jax.Array:
    layout, look_up = FORMS[form]
    return nf4.dequantize(dataclasses.replace(weight, layout=layout), dtype, look_up)


def loop(make: Any, row: jax.Array, weights: Any) -> jax.Array:
    """Sum over the experts of row · Wᵀ."""

    def body(total: jax.Array, e: jax.Array) -> tuple[jax.Array, None]:
        w = jax.lax.optimization_barrier(make(part(weights, e)))
        return total + jnp.einsum("ti,oi->to", row, w), None

    return jax.lax.scan(body, jnp.zeros((1, weights.shape[-2]), row.dtype), jnp.arange(EXPERTS))[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", default="14336x4096", help="OUTxIN")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--single", action="store_true", help="block scales in fp32, not in 8 bits")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--out", type=Path)
    o = parser.parse_args()
    shape, dtype = tuple(int(n) for n in o.shape.split("x")), jnp.dtype(o.dtype)
    weights = quantized.abstract("nf4" if o.single else "nf4-double", (EXPERTS, *shape)).random(jax.random.key(0))
    row = jnp.ones((1, shape[1]), dtype)
    n = math.prod(shape)
    moved = EXPERTS * n * (0.5 + dtype.itemsize)
    rate = copy_rate(int(moved / 2))  # read and written: as many bytes
    plain = jnp.ones((EXPERTS, *shape), dtype)
    multiply = jax.jit(lambda row, w: loop(lambda x: x, row, w))
    product = statistics.median(in_turn({"": partial(multiply, row, plain)}, o.repeat)[""])
    del plain
    report = kept.about(
        device=jax.local_devices()[0].device_kind, cores=os.cpu_count(), shape=list(shape), dtype=o.dtype, copy_bytes_per_second=rate,
        product_seconds=product / EXPERTS, forms={},
    )  # fmt: skip
    print(f"the product alone {1e3 * product / EXPERTS:.3f} ms a matrix, a copy {rate / 1e9:.2f} GB/s")
    runs = {form: jax.jit(lambda row, w, form=form: loop(lambda t: dequantized(form, t, dtype), row, w)) for form in FORMS}
    taken = in_turn({form: partial(run, row, weights) for form, run in runs.items()}, o.repeat)
    for form, all_ in taken.items():
        seconds = statistics.median(all_) / EXPERTS
        reached = moved / EXPERTS / seconds
        report["forms"][form] = {"seconds": seconds, "bytes_per_second": reached, "of_copy": reached / rate}
        share = 100 * reached / rate
        print(f"{form:<13} {1e3 * seconds:9.3f} ms a matrix, {reached / 1e9:8.2f} GB/s, {share:4.0f} % of a copy", flush=True)
    kept.write(o.out, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
