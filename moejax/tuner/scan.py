"""The selective scan: its forms and the tokens of a chunk."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from moejax import gpus
from moejax.config import Experiment
from moejax.models.config import Architecture, specs
from moejax.models.ops import choice
from moejax.tuner.drawn import Drawn
from moejax.tuner.registry import MARGIN, UNSTABLE_MARGIN, Candidate, Case
from moejax.tuner.shapes import rows_of

CHUNKS = (8, 16, 32, 64)


def shapes(experiment: Experiment, config: Architecture) -> list[dict[str, Any]]:
    if experiment.model.scan != "auto":
        return []
    rows, length = rows_of(experiment)
    sizes = {(stack.block.mixer.inner, stack.block.mixer.state) for stack in config.stacks if isinstance(stack.block.mixer, specs.Mamba)}
    dtype = experiment.training.compute_dtype
    return [
        {"rows": rows * experiment.training.together, "length": length, "channels": inner, "state": state, "dtype": dtype}
        for inner, state in sorted(sizes)
    ]


def candidates(device: str, shape: dict[str, Any]) -> list[Candidate]:
    """The form that runs where nothing was measured, and every other of `choice.CHUNKS`, with several chunks."""
    from moejax.models.ops import scan_kernel

    why = scan_kernel.refusal(device, gpus.capability(device))
    usual = "chunked" if device == "cpu" else "chunked_associative"
    first = (usual, choice.CHUNKS[usual])
    chunks = dict.fromkeys(choice.CHUNKS, CHUNKS) | {"kernel": (choice.CHUNKS["kernel"],)}  # it has its own
    others = [(form, n) for form, several in chunks.items() for n in several if n <= shape["length"] and (form, n) != first]
    return [
        Candidate(
            f"{form} {chunk}", {"form": form, "chunk": chunk}, best=number == 0 or chunk == choice.CHUNKS[form],
            margin=UNSTABLE_MARGIN if form == "kernel" else MARGIN, why_not=why if form == "kernel" else None,
        )
        for number, (form, chunk) in enumerate([first, *others])
    ]  # fmt: skip


def build(device: str, shape: dict[str, Any], entry: dict[str, Any]) -> Any:
    """(the operands of `gated`, starts, state, gradients of both results) -> both results, and gradients of all operands."""
    import jax

    from moejax.models.ops.selective_scan import gated

    form: Any = partial(gated, form=entry["form"], chunk=entry["chunk"])

    def run(operands: Any, starts: Any, state: Any, cotangents: Any) -> Any:
        found, pull = jax.vjp(lambda operands, state: form(*operands, starts, state), operands, state)
        return found, pull(cotangents)

    return jax.jit(run)


def cases(shape: dict[str, Any]) -> Iterator[Case]:
    """Packed rows (timed), a border at every token and at none, and a row whose length is a multiple of nothing."""
    b, t, d, n = (shape[name] for name in ("rows", "length", "channels", "state"))

    yield Case("packed rows", _operands(b, t, d, n, shape["dtype"], max(t // 4, 1)), True)
    yield Case("a border every third token", _operands(b, t, d, n, shape["dtype"], 3))
    yield Case("no border", _operands(b, t, d, n, shape["dtype"], t + 1))
    if t > 3:
        yield Case(f"rows of {t - 3} tokens", _operands(b, t - 3, d, n, shape["dtype"], 7))


def _operands(b: int, t: int, d: int, n: int, dtype: str, every: int) -> tuple[Any, ...]:
    import jax.numpy as jnp
    import numpy as np

    drawn = Drawn(t)
    u, y, raw, z = (drawn.normal(b, t, wide, dtype=dtype) for wide in (d, d, d, 2 * d))  # z is the second half
    bb, cc = (drawn.normal(b, t, n, dtype=dtype) for _ in range(2))
    a = -jnp.asarray(np.broadcast_to(np.arange(1, n + 1, dtype=np.float32), (d, n)))
    state, last = drawn.normal(b, d, n), drawn.normal(b, d, n)
    starts = jnp.asarray(np.broadcast_to((np.arange(t) + 1) % every == 0, (b, t)))
    ones = jnp.asarray(np.ones(d, np.float32))
    return (u, raw, a, bb, cc, ones, -4 * ones, z), starts, state, (y, last)
