"""The look-up of 4-bit codes' values (NF4): equal to the bit in every form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moejax.config import Experiment
from moejax.models.config import Architecture
from moejax.tuner.drawn import Drawn
from moejax.tuner.registry import Candidate, Case

EXACT = True

def shapes(experiment: Experiment, config: Architecture) -> list[dict[str, Any]]:
    kind = experiment.kinds(config).get("experts")
    if kind is None or not kind.startswith("nf4"):
        return []
    return [{"out": config.intermediate_size, "in": config.hidden_size, "storage": kind, "dtype": experiment.training.compute_dtype}]


def candidates(device: str, shape: dict[str, Any]) -> list[Candidate]:
    from moejax.models.ops.nf4 import LOOK_UPS

    return [Candidate(form, {"form": form}) for form in LOOK_UPS]


def build(device: str, shape: dict[str, Any], entry: dict[str, Any]) -> Any:
    """A matrix of codes -> its weights."""
    import jax

    from moejax.models.ops.nf4 import LOOK_UPS, dequantize

    return jax.jit(lambda weight: dequantize(weight, shape["dtype"], LOOK_UPS[entry["form"]]))


def cases(shape: dict[str, Any]) -> Iterator[Case]:
    """A matrix of the run's, and one whose rows are no whole blocks."""
    drawn = Drawn(0)
    yield Case("a matrix of random codes", (drawn.weight(shape["storage"], shape["out"], shape["in"]),), True)
    yield Case("rows of 70 weights", (drawn.weight(shape["storage"], 37, 70),))
