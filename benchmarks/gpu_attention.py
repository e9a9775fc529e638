"""Packed causal attention: this repository's against cuDNN's with the same segment mask; difference and seconds, forward and backward.

    python benchmarks/gpu_attention.py --out benchmarks/results/<date>-gpu-attention.json     # Mixtral's heads, rows of 512 and 2048
    JAX_PLATFORMS=cpu python benchmarks/gpu_attention.py --tiny                               # beside XLA's own, on a CPU

cuDNN has no segment ids in jax: the mask goes in as it is, and reaches the kernel as a bias [B, 1, T, T], causality with it. The largest
difference, of the largest element, is from `segment_attention` in fp32; it decides before the seconds do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import kept
from clock import difference, in_turn

from moejax.models.ops.attention import segment_attention

QUERIES = 4  # in a row


def by_jax(implementation: str) -> Any:
    def attention(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        t = jnp.arange(q.shape[1])
        mask = (segments[:, :, None] == segments[:, None, :]) & (t[:, None] >= t)[None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation=implementation)  # type: ignore[arg-type]

    return attention


def both_passes(attention: Any) -> Any:
    def run(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, dy: jax.Array) -> Any:
        y, pull = jax.vjp(lambda q, k, v: attention(q, k, v, segments), q, k, v)
        return y, *pull(dy)

    return jax.jit(run)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", default="8x512,32x512,8x2048", help="comma-separated ROWSxTOKENS")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    o = parser.parse_args()
    heads, groups, size = (4, 2, 16) if o.tiny else (32, 8, 128)
    report = kept.about(device=jax.local_devices()[0].device_kind, cases=[])
    forms = {"ours": segment_attention, "xla": by_jax("xla")} | ({} if o.tiny else {"cudnn": by_jax("cudnn")})
    for case in ("2x64" if o.tiny else o.cases).split(","):
        b, t = (int(n) for n in case.split("x"))
        shapes = ((b, t, heads, size), (b, t, groups, size), (b, t, groups, size), (b, t, heads, size))
        q, k, v, dy = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(shapes))
        segments = jnp.broadcast_to(1 + jnp.arange(t) * QUERIES // t, (b, t))
        exact = both_passes(segment_attention)(q, k, v, segments, dy)
        arguments = [*(a.astype(jnp.bfloat16) for a in (q, k, v)), segments, dy.astype(jnp.bfloat16)]
        for name, form in forms.items():
            row: dict[str, Any] = {"rows": b, "row_tokens": t, "form": name}
            try:
                compiled = both_passes(form)
                found = compiled(*arguments)
                row["difference"] = difference(found, exact)
                seconds = in_turn({"": partial(compiled, *arguments)}, o.repeat)[""]
                row["seconds"] = {"median": statistics.median(seconds), "all": seconds}
            except (RuntimeError, ValueError, NotImplementedError) as error:  # no cuDNN, or a shape it does not take: said, and on
                row["error"] = str(error)[:300]
            report["cases"].append(row)
            print(json.dumps({n: v for n, v in row.items() if n != "seconds"} | {"median": row.get("seconds", {}).get("median")}))
    kept.write(o.out, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
