"""Attention inside segments: blocks of queries by XLA, or flash attention where it can run."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from moejax.config import Experiment
from moejax.models.config import Architecture
from moejax.models.ops import flash
from moejax.tuner.drawn import Drawn
from moejax.tuner.registry import UNSTABLE_MARGIN, Candidate, Case
from moejax.tuner.shapes import rows_of


def shapes(experiment: Experiment, config: Architecture) -> list[dict[str, Any]]:
    rows, length = rows_of(experiment)
    if experiment.model.attention != "auto":
        return []
    mixers = [stack.block.mixer for stack in config.stacks]
    plain: Any = [m for m in mixers if hasattr(m, "kv_heads") and not getattr(m, "sinks", False) and getattr(m, "window", None) is None]
    return [
        {"rows": rows * experiment.training.together, "length": length, "heads": heads, "kv_heads": kv, "head_dim": dim,
         "dtype": experiment.training.compute_dtype}
        for heads, kv, dim in sorted({(m.heads, m.kv_heads, m.head_dim) for m in plain})
    ]  # fmt: skip


def candidates(device: str, shape: dict[str, Any]) -> list[Candidate]:
    why = flash.why_blocks("flash", device, shape["dtype"], shape["head_dim"], shape["length"])
    return [Candidate("blocks", {"form": "blocks"}), Candidate("flash", {"form": "flash"}, margin=UNSTABLE_MARGIN, why_not=why)]


def build(device: str, shape: dict[str, Any], entry: dict[str, Any]) -> Any:
    """(q, k, v, their output's gradient, segment ids) -> the output, and gradients of q, k and v."""
    import jax

    from moejax.models.ops.attention import segment_attention

    attend: Any = {"blocks": segment_attention, "flash": partial(flash.attention, device)}[entry["form"]]

    def run(q: Any, k: Any, v: Any, dout: Any, segment_ids: Any) -> Any:
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, segment_ids), q, k, v)
        return out, pull(dout)

    return jax.jit(run)


def cases(shape: dict[str, Any]) -> Iterator[Case]:
    """Packed rows (timed), one segment a row, borders at many residues with padding at the end, and rows of a length that is a multiple
    of nothing."""
    import numpy as np

    t = shape["length"]
    at = np.arange(t)
    yield Case("packed rows", _operands(shape, t, at // max(t // 4, 1) + 1), True)
    yield Case("one segment", _operands(shape, t, np.ones(t)))
    borders = np.cumsum(np.isin(at, np.cumsum(np.arange(1, t))))  # segments of 1, 2, 3, … tokens
    yield Case("borders at every residue, padding", _operands(shape, t, np.where(at < t - t // 5, borders + 1, 0)))
    if t > 131:
        yield Case(f"rows of {t - 3} tokens", _operands(shape, t - 3, at[: t - 3] // 50 + 1))


def _operands(shape: dict[str, Any], t: int, segments: Any) -> tuple[Any, ...]:
    import jax.numpy as jnp
    import numpy as np

    b, dim, drawn = shape["rows"], shape["head_dim"], Drawn(t)
    heads = (shape["heads"], shape["kv_heads"], shape["kv_heads"], shape["heads"])
    q, k, v, dout = (drawn.normal(b, t, h, dim, dtype=shape["dtype"]) for h in heads)
    return q, k, v, dout, jnp.asarray(np.broadcast_to(np.asarray(segments, np.int32), (b, t)))
