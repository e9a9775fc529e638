"""Forms of a step's seconds, and their fit: all that were tried, from which `FORM` was chosen by leaving receipts out. No jax.

    seconds = accumulation · step(weights' bytes / bandwidth / a, FLOPs / peak / b, blocks · d + visits · v(tool, version), bus / c)

a, b and c are shares of a data sheet's rates that are reached, d what the host takes for a block whatever is in it, v for an expert that is
visited by itself: a few dozen launches of some microseconds, fewer with each version. All coefficients are positive, and near what they
are known to be elsewhere (`_PRIOR`, with its factor): few receipts only move them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from moejax.estimator.least_squares import FloatArray
from moejax.estimator.tools.work import TOOLS, Recipe, Work, version_number, work
from moejax.gpus import GPU

SCATTER = 0.25
"""Of the logarithm of one measured step's seconds that any form leaves open: boxes, data, what was not published."""
_PRIOR = {"moving": (0.7, 0.3), "computing": (0.5, 0.5), "fetching": (0.7, 0.3), "block": (0.008, 0.5), "visit": (0.0006, 0.7)}
"""Value and deviation of its logarithm. A visit: some 85 launches, forward, again and backward, of 7 µs; a block: a thousand."""
_NEWER = 0.6, 1.2
"""From the oldest version of a tool to the newest: what is left of a visit's seconds."""


@dataclass(frozen=True)
class Form:
    """Which terms a form has. together: how what the card does and what the host does join: one after the other ("sum"), the longer of the
    two ("max"), or between ("root")."""

    name: str
    blocks: bool = True
    visits: bool = True
    grouped: bool = True
    versions: bool = True
    tools: bool = False
    together: str = "sum"
    card: str = "max"


FORMS = (
    Form("roofline alone", False, False, False, False),
    Form("+ blocks", True, False, False, False),
    Form("+ visits of experts", True, True, False, False),
    Form("+ grouped products where the card has them", True, True, True, False),
    Form("+ versions, without grouped products", True, True, False, True),
    Form("+ versions; bytes and FLOPs added", card="sum"),
    Form("+ versions; blocks by tool", tools=True),
    Form("+ versions; host and card overlap", together="max"),
    Form("+ versions; host and card overlap in part", together="root"),
    Form("+ versions"),
)
"""Tried; each stands in `moejax estimate receipts --forms` with its errors."""
FORM = FORMS[-1]
"""Of the smallest mean error when each receipt is left out."""


@dataclass(frozen=True)
class Design:
    """Recipes as arrays: columns of `Work`, and which logarithms of coefficients make a visit's cost."""

    columns: FloatArray
    accumulation: FloatArray
    visit: FloatArray
    tool: FloatArray


@dataclass(frozen=True)
class Law:
    """A fitted form. logs: of its coefficients; knots: of each tool the versions (`version_number`) that receipts name."""

    form: Form
    logs: FloatArray
    knots: dict[str, list[float]]
    names: tuple[str, ...] = field(default=())

    def seconds(self, recipes: Sequence[Recipe], gpus: Sequence[GPU]) -> FloatArray:
        return _seconds(self.form, self.logs, _design(recipes, [work(r, g) for r, g in zip(recipes, gpus, strict=True)], self.knots))

    @property
    def coefficients(self) -> dict[str, float]:
        return dict(zip(self.names, np.exp(self.logs).tolist(), strict=True))


def fit(form: Form, recipes: Sequence[Recipe], works: Sequence[Work], seconds: FloatArray) -> Law:
    """The coefficients of smallest errors of logarithms, a far one counted less (soft L1), and nearest to what is known."""
    from scipy.optimize import least_squares

    knots = {tool: _knots(form, tool, recipes) for tool in TOOLS}
    names, prior, deviation = _coefficients(knots)
    design, target, n = _design(recipes, works, knots), np.log(seconds), len(seconds)

    def residuals(logs: FloatArray) -> FloatArray:
        open_ones = (np.log(_seconds(form, logs, design)) - target) / SCATTER
        return np.concatenate([open_ones, (logs - prior) / deviation])

    def loss(z: FloatArray) -> FloatArray:
        rho = np.array([z, np.ones_like(z), np.zeros_like(z)])
        near = 1 + z[:n]
        rho[:, :n] = 2 * (np.sqrt(near) - 1), near**-0.5, -0.5 * near**-1.5
        return rho

    found = least_squares(residuals, prior, loss=loss, xtol=1e-6, ftol=1e-6)
    return Law(form, np.asarray(found.x), knots, names)


def _knots(form: Form, tool: str, recipes: Sequence[Recipe]) -> list[float]:
    found = sorted({version_number(r.version) for r in recipes if r.tool == tool and r.version}) if form.versions else []
    return found or [0.0]


def _coefficients(knots: dict[str, list[float]]) -> tuple[tuple[str, ...], FloatArray, FloatArray]:
    """(names, logarithms that are known, their deviations)."""
    rows = [(name, np.log(value), deviation) for name, (value, deviation) in _PRIOR.items() if name != "visit"]
    rows += [(f"block: {tool}", 0.0, 0.3) for tool in TOOLS]
    for tool, versions in knots.items():
        rows.append((f"visit: {tool}", np.log(_PRIOR["visit"][0]), _PRIOR["visit"][1]))
        for before, after in itertools.pairwise(versions):
            share = (after - before) / (versions[-1] - versions[0])
            rows.append((f"visit: {tool}, from {before:g} to {after:g}", share * np.log(_NEWER[0]), np.sqrt(share) * _NEWER[1]))
    names, prior, deviation = zip(*rows, strict=True)
    return names, np.array(prior), np.array(deviation)


def _design(recipes: Sequence[Recipe], works: Sequence[Work], knots: dict[str, list[float]]) -> Design:
    names, *_ = _coefficients(knots)
    visit = np.zeros((len(recipes), len(names)))
    tool = np.zeros((len(recipes), len(names)))
    for row, recipe in enumerate(recipes):
        versions = knots[recipe.tool]
        first = names.index(f"visit: {recipe.tool}")
        at = version_number(recipe.version) if recipe.version else versions[-1]  # the newest that is known
        visit[row, first] = 1.0
        for step, (before, after) in enumerate(itertools.pairwise(versions), first + 1):
            visit[row, step] = np.clip((at - before) / (after - before), 0.0, 1.0)
        tool[row, names.index(f"block: {recipe.tool}")] = 1.0
    columns = np.array(
        [(w.moving, w.computing, w.fetching, w.blocks, w.visits, w.visits_without_grouped, w.step_seconds) for w in works]
    ).T  # fmt: skip
    return Design(columns, np.array([float(r.accumulation) for r in recipes]), visit, tool)


def _seconds(form: Form, logs: FloatArray, design: Design) -> FloatArray:
    moving, computing, fetching, blocks, visits, ungrouped, step = design.columns
    a, b, c, block = np.exp(logs[:4])
    card = moving / a + computing / b if form.card == "sum" else np.maximum(moving / a, computing / b)
    of_tool = np.exp(design.tool @ logs) if form.tools else 1.0
    host = blocks * block * of_tool * form.blocks
    host = host + form.visits * (ungrouped if form.grouped else visits) * np.exp(design.visit @ logs)
    match form.together:
        case "max":
            both = np.maximum(card, host)
        case "root":
            both = np.hypot(card, host)
        case _:
            both = card + host
    return design.accumulation * (both + fetching / c) + step / a
