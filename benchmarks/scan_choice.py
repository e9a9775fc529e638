"""Measure the selective scan's forms and chunks on this device, and write the fastest into models/ops/choice.json.

    python benchmarks/scan_choice.py --out benchmarks/results/<date>-scan-choice-<device>.json --update   # the shapes of this device
    python benchmarks/scan_choice.py --cases 2x1024x512                                                   # only look
    python benchmarks/scan_choice.py --tiny                                                               # a small one, in seconds

A case is ROWSxLENGTHxCHANNELS, 16 states; forward and backward. Candidates take turns, so that all meet the same noise; what runs without a
measurement is beaten only by more than `MARGIN`. Next to each time: the floor of the bytes that must move (every operand and gradient once,
in the compute dtype's bytes, and boundary states) at the device's measured copy rate, temporary memory by the compiler, and the largest
difference from the scan in chunks of one token on the device, relative to that one's largest element, over the output and all gradients.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.92")
sys.path.insert(0, str(Path(__file__).parent.parent))

import choices
import jax
import jax.numpy as jnp
import kept
from clock import copy_rate, difference, in_turn

from moejax.models.ops import choice
from moejax.models.ops import selective_scan as ss

STATES = 16
MARGIN = 1.1
SHAPE = choice.SHAPES["scan"]
CASES = {
    "cpu": "1x192x256,8x192x256,8x256x256,2x1024x512,8x512x512",
    "gpu": "1x512x2944,8x512x2944,16x512x2944,4x2048x2944,16x2048x2944",
}
CHUNKS = {"cpu": "8,16,32,64", "gpu": "16,32,64,128"}
LARGEST_WHOLE_ROW = 2e9
"""The whole-row associative scan holds several [B, T, D, N] in fp32 at a time: beyond this many elements it is left out."""


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


def measure(case: str, chunks: str, dtype: str, repeat: int, rate: float) -> list[dict[str, Any]]:
    """One row for each form and chunk."""
    b, t, d = (int(n) for n in case.split("x"))
    arguments, starts = operands(b, t, d, STATES, dtype)
    weights = jax.random.normal(jax.random.key(1), (b, t, d))
    reference = gradient("chunked", 1)(arguments, starts, weights)
    # u, dt, B, C in and their gradients out, y out and its gradient in; states at the chunks' starts are few.
    floor = 2 * sum(x.nbytes for x in arguments) + 2 * weights.nbytes
    forms: list[tuple[str, int | None]] = [(f, int(c)) for c in chunks.split(",") for f in ("chunked", "chunked_associative")]
    if choice.here() != "cpu":
        forms.append(("kernel", choice.CHUNKS["kernel"]))
    if b * t * d * STATES <= LARGEST_WHOLE_ROW:
        forms.append(("associative", None))
    rows, calls = [], {}
    for index, (form, chunk) in enumerate(forms):
        row: dict[str, Any] = dict(zip(SHAPE, (b, t, d), strict=True)) | {"form": form, "chunk": chunk, "dtype": dtype}
        rows.append(row)
        try:
            call = gradient(form if chunk else "chunked_associative", chunk or t).lower(arguments, starts, weights).compile()
            row["largest_difference"] = difference(call(arguments, starts, weights), reference)
            row |= {"temporary_bytes": call.memory_analysis().temp_size_in_bytes, "floor_bytes": floor, "floor_seconds": floor / rate}
            calls[index] = lambda call=call: call(arguments, starts, weights)
        except jax.errors.JaxRuntimeError as error:  # out of memory: the others go on
            row["error"] = str(error)[:300]
    for index, all_ in in_turn(calls, repeat).items():
        rows[index]["seconds"] = {"median": statistics.median(all_), "all": all_}
    return rows


def decide(platform: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the table says of a case: the fastest, unless what runs without a measurement is within the margin."""
    timed = {(r["form"], r["chunk"]): r["seconds"]["median"] for r in rows if "seconds" in r and r["chunk"]}
    fastest = min(timed, key=lambda name: timed[name])
    form = "chunked" if platform == "cpu" else "chunked_associative"
    usual = (form, choice.CHUNKS[form])
    form, chunk = usual if usual in timed and timed[usual] < MARGIN * timed[fastest] else fastest
    return {name: rows[0][name] for name in SHAPE} | {"form": form, "chunk": chunk}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    platform = "cpu" if jax.default_backend() == "cpu" else "gpu"
    parser.add_argument("--cases", default=CASES[platform], help="comma-separated ROWSxLENGTHxCHANNELS")
    parser.add_argument("--chunks", default=CHUNKS[platform])
    o = choices.parsed(parser, "float32")
    cases, chunks = ("2x64x32", "16") if o.tiny else (o.cases, o.chunks)
    rate = copy_rate(1 << 22 if o.tiny else 1 << 30)
    report = kept.about(device=choice.here(), cores=os.cpu_count(), copy_bytes_per_second=rate, cases=[], entries=[])
    for case in cases.split(","):
        rows = measure(case, chunks, o.dtype, o.repeat, rate)
        report["cases"] += rows
        report["entries"].append(decide(platform, rows))
        print(f"{case} {o.dtype}: {report['entries'][-1]['form']} {report['entries'][-1]['chunk']}")
        for row in rows:
            cost = f"{1e3 * row['seconds']['median']:9.3f} ms, {row['temporary_bytes'] / 1e6:9.1f} MB" if "seconds" in row else row["error"]
            print(f"  {row['form']:<20} {row['chunk'] or '':>4} {cost}", flush=True)
        kept.write(o.out, report)
    if o.update:
        choices.update("scan", report["device"], report["entries"], o.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
