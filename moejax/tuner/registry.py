"""What is tuned, and by what it may run. A new candidate is one line: in its operation's `candidates`, or through `register`.

An operation's module has
    shapes(experiment, config) -> the run's shapes of it; none where the model has no such operation or nothing is to choose
    candidates(device, shape) -> Candidates, the portable path first
    build(device, shape, entry) -> a function of a case's operands to values and gradients, as `choice` with this entry would run it
    cases(shape) -> Cases: hostile operands, and those that are timed
    EXACT, NORM: results agree to the bit; or each as a whole, in place of its numbers one by one
and is imported where it is used: only a child process computes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

OPERATIONS = {
    "grouped": "moejax.tuner.experts",
    "scan": "moejax.tuner.scan",
    "attention": "moejax.tuner.attention",
    "look_up": "moejax.tuner.look_up",
    "graphs": "moejax.tuner.graphs",
    "remat": "moejax.tuner.remat",
}
"""Operation, as `moejax.models.ops.choice` calls it -> its module."""
MARGIN, UNSTABLE_MARGIN = 1.05, 1.10
"""By how much a candidate must beat the portable path; one that uses what jax may change or remove, by more."""


class Candidate(NamedTuple):
    """entry: what `choice` is given if it wins; built_by: "module:function" in place of its operation's `build`; why_not: why it cannot
    run here; best: among those that the quick form tries; seconds: of its child process, at most."""

    name: str
    entry: dict[str, Any]
    built_by: str = ""
    margin: float = MARGIN
    why_not: str | None = None
    best: bool = True
    seconds: float = 90.0


class Case(NamedTuple):
    """Operands of a program. timed: one that counts for the time; of the others only values and gradients are compared."""

    name: str
    operands: tuple[Any, ...]
    timed: bool = False


_more: dict[str, list[Callable[[str, dict[str, Any]], Iterable[Candidate]]]] = {}


def register(operation: str, make: Callable[[str, dict[str, Any]], Iterable[Candidate]]) -> None:
    """Further candidates of an operation: `make(device, shape)`."""
    _more.setdefault(operation, []).append(make)


def module(operation: str) -> Any:
    return importlib.import_module(OPERATIONS[operation])


def candidates(operation: str, device: str, shape: dict[str, Any]) -> list[Candidate]:
    """All that are registered, the portable path first."""
    further = [one for make in _more.get(operation, ()) for one in make(device, shape)]
    return [*module(operation).candidates(device, shape), *further]
