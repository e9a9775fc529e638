"""The child process of one candidate: `python -m moejax.tuner.trial REQUEST RESULT`. It may hang or die; its parent reads how far it came.

Values and gradients against the portable path on every case, each twice for equal bits, with memory that holds NaN where a result will
lie; only then seconds, the two in turn. No jax here: the operations bring it.
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moejax.errors import first_line
from moejax.files import replace_text

LIMITS = {"bfloat16": 2.5e-2, "float32": 1e-5}
"""Largest difference from the portable path, of each result's largest element, by the dtype that is computed in."""
ROUNDED = 2e-3
"""The same of fp32 on a GPU, whose products may be rounded to 10 bits."""
SECONDS, ROUNDS = 2.0, (5, 40)
"""For the timed rounds of a case, and how many there are at least and at most."""


class Wrong(Exception):
    """A candidate whose results are not the portable path's."""


def leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, tuple | list):
        for part in tree:
            yield from leaves(part)
    elif tree is not None:
        yield tree


def settled(tree: Any) -> list[np.ndarray]:
    """On the host."""
    return [np.asarray(leaf) for leaf in leaves(tree)]


def compare(
    name: str, found: list[np.ndarray], again: list[np.ndarray], expected: list[np.ndarray], limit: float, *, norm: bool = False
) -> float:  # fmt: skip
    """The largest difference, over the result's largest number; norm: the root of the sum of squares, over the result's. Raises Wrong."""
    worst = 0.0
    for number, (one, two, right) in enumerate(zip(found, again, expected, strict=True)):
        where = f"{name}: result {number + 1} of {len(expected)}"
        if one.shape != right.shape:
            raise Wrong(f"{where} has shape {list(one.shape)}, not {list(right.shape)}")
        a, b, e = (np.asarray(v, np.float32) for v in (one, two, right))
        bad = ~np.isfinite(a) & np.isfinite(e)
        if bad.any():
            raise Wrong(f"{where} has {int(bad.sum())} numbers that are not finite")
        if not np.array_equal(a, b, equal_nan=True):
            raise Wrong(f"{where} has other bits when it is computed again")
        real = np.isfinite(e)
        apart, whole = (float(np.linalg.norm(x[real]) if norm else np.max(np.abs(x), initial=0.0, where=real)) for x in (a - e, e))
        apart /= whole or 1.0
        if apart > limit:
            raise Wrong(f"{where} differs by {apart:.2g} of its {'norm' if norm else 'largest'}, allowed is {limit:g}")
        worst = max(worst, apart)
    return worst


def poison(like: Any) -> None:
    """Memory that is free again holds NaN: what a program does not write shows."""
    if "jax" in sys.modules:
        import jax
        import jax.numpy as jnp

        real = [leaf for leaf in leaves(like) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        jax.block_until_ready([jnp.full(leaf.shape, jnp.nan, leaf.dtype) for leaf in real])


def seconds_of(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    result = call()
    for leaf in leaves(result):
        getattr(leaf, "block_until_ready", lambda: None)()
    return time.perf_counter() - began


def in_turn(one: Callable[[], Any], other: Callable[[], Any]) -> tuple[float, float]:
    """Medians of both."""
    first = seconds_of(one) + seconds_of(other)
    rounds = min(max(int(SECONDS / max(first, 1e-9)), ROUNDS[0]), ROUNDS[1])
    seconds = [(seconds_of(one), seconds_of(other)) for _ in range(rounds)]
    return statistics.median(a for a, _ in seconds), statistics.median(b for _, b in seconds)


def limit_of(device: str, dtype: str, exact: bool) -> float:
    return 0.0 if exact else ROUNDED if dtype == "float32" and device != "cpu" else LIMITS.get(dtype, LIMITS["bfloat16"])


def measured(request: dict[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
    """The result of a request (see `trials.request`)."""
    module, device, shape = importlib.import_module(request["module"]), request["device"], request["shape"]
    norm = getattr(module, "NORM", False)
    limit = limit_of(device, shape.get("dtype", "float32"), getattr(module, "EXACT", False))
    built_by, _, function = request["built_by"].partition(":")
    tell("building the portable path")
    portable = module.build(device, shape, request["portable"])
    tell("building the candidate")
    candidate = getattr(importlib.import_module(built_by), function)(device, shape, request["entry"]) if built_by else \
        module.build(device, shape, request["entry"])  # fmt: skip
    worst, total = 0.0, [0.0, 0.0]
    timed = []
    for case in module.cases(shape):
        tell(f"the portable path, {case.name}")
        right = portable(*case.operands)
        expected = settled(right)
        tell(case.name)
        poison(right)
        found = settled(candidate(*case.operands))
        worst = max(worst, compare(case.name, found, settled(candidate(*case.operands)), expected, limit, norm=norm))
        if case.timed:
            timed.append(case)
    for case in timed:
        tell(f"timing, {case.name}")
        seconds = in_turn(partial(portable, *case.operands), partial(candidate, *case.operands))
        total = [a + b for a, b in zip(total, seconds, strict=True)]
    return {"status": "measured", "portable_seconds": total[0], "seconds": total[1], "difference": worst}


def main(arguments: list[str]) -> int:
    if arguments[0] == "--device":  # asked in a process of its own where there is a GPU: who asks takes the GPU's memory
        from moejax.models.ops import choice

        replace_text(Path(arguments[1]), json.dumps({"device": choice.here()}))
        return 0
    request, file = json.loads(Path(arguments[0]).read_text(encoding="utf-8")), Path(arguments[1])
    stage = ""

    def tell(now: str) -> None:
        nonlocal stage
        stage = now
        replace_text(file, json.dumps({"status": "running", "stage": stage}))

    try:
        result = measured(request, tell)
    except Wrong as error:
        result = {"status": "wrong", "why": str(error)}
    except Exception as error:  # noqa: BLE001 - whatever a candidate raises is its reason
        full = any(word in str(error) for word in ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory"))
        result = {"status": "no room" if full else "failed", "why": f"{stage}: {first_line(error)[:200]}"}
    replace_text(file, json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
