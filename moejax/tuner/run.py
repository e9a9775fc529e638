"""All operations of a run, candidate by candidate, within a time limit: what is tried, what came of it, and what it gained."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from moejax.config import Experiment
from moejax.models.config import Architecture
from moejax.progress import Table, waiting
from moejax.tuner import registry, trials
from moejax.tuner.registry import Candidate

LIMITS = {"quick": 180.0, "full": 480.0}
"""Seconds of both forms."""


class Asked(NamedTuple):
    """One operation at one shape. known: it was measured here before."""

    operation: str
    shape: dict[str, Any]
    candidates: list[Candidate]
    known: bool = False


def plan(experiment: Experiment, config: Architecture, device: str, known: list[dict[str, Any]], *, full: bool) -> list[Asked]:
    """Every operation that the run has and that has something to choose; the quick form with the best candidates of each."""
    before = [(site["operation"], site["shape"]) for site in known]
    found = []
    for operation in registry.OPERATIONS:
        for shape in registry.module(operation).shapes(experiment, config):
            several = registry.candidates(operation, device, shape)
            tried = [one for number, one in enumerate(several) if full or number == 0 or one.best]
            found.append(Asked(operation, shape, tried, (operation, shape) in before))
    return found


def tune(asked: list[Asked], device: str, *, seconds: float) -> list[dict[str, Any]]:
    """The sites, as `store` has them."""
    ends, sites = time.monotonic() + seconds, []
    for operation, shape, several, _ in asked:
        portable, *others = several
        tried: list[dict[str, Any]] = []
        for one in others:
            left = ends - time.monotonic()
            if one.why_not is not None:
                result: dict[str, Any] = {"status": "not here", "why": one.why_not}
            elif left < 1:
                result = {"status": "not tried", "why": f"the {seconds:.0f} s were over"}
            else:
                with waiting(f"{operation}: {one.name}"):
                    result = trials.run(trials.request(operation, device, shape, portable, one), min(left, one.seconds))
            tried.append({"name": one.name, "margin": one.margin, "entry": one.entry, **result})
        sites.append(decided(operation, shape, portable, tried))
    return sites


def decided(operation: str, shape: dict[str, Any], portable: Candidate, tried: list[dict[str, Any]]) -> dict[str, Any]:
    """The site with its winner: the fastest of those that beat the portable path by their margin; else that one."""
    for one in tried:
        if one["status"] == "measured":
            one["gain"] = one["portable_seconds"] / one["seconds"]
    better = [one for one in tried if one.get("gain", 0.0) > one["margin"]]
    best = max(better, key=lambda one: one["gain"], default={"name": portable.name, "entry": portable.entry, "gain": 1.0})
    return {
        "operation": operation, "shape": shape, "winner": best["name"], "entry": best["entry"], "gain": best["gain"],
        "portable": portable.name, "tried": tried, "complete": all(one["status"] != "not tried" for one in tried),
    }  # fmt: skip


def result_of(one: dict[str, Any]) -> str:
    if one["status"] != "measured":
        return f"{one['status']}: {one['why']}"
    times = f"{1e3 * one['seconds']:.3g} ms for {1e3 * one['portable_seconds']:.3g} ({one['gain']:.2f} x)"
    return times if one["gain"] > one["margin"] else f"{times}: not {one['margin']:.2f} x faster"


def told(shape: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in shape.items() if not isinstance(value, dict))


def plan_table(asked: list[Asked]) -> Table:
    rows = []
    for operation, shape, several, known in asked:
        for number, one in enumerate(several):
            what = "the portable path, against which all are checked" if number == 0 else one.why_not or "would be tried"
            rows.append((operation if number == 0 else "", one.name, "measured before" if known and number else what))
        rows.append(("", told(shape), ""))
    return Table(rows, columns=("operation", "candidate", ""), title="what would be tried")


def table(sites: list[dict[str, Any]]) -> Table:
    rows = []
    for site in sites:
        rows.append((site["operation"], site["portable"], "the portable path"))
        rows += [("", one["name"], result_of(one)) for one in site["tried"]]
    return Table(rows, columns=("operation", "candidate", "forward and backward"), title="tried on this machine")


def gains(sites: list[dict[str, Any]]) -> list[str]:
    """One line an operation: what runs from now on, and what that gained."""
    lines = []
    for site in sites:
        gain = f"{site['gain']:.2f} times as fast as {site['portable']}" if site["gain"] > 1 else "the portable path: nothing was faster"
        lines.append(f"{site['operation']}: {site['winner']}, {gain}" + ("" if site["complete"] else "; not all was tried"))
    return lines
