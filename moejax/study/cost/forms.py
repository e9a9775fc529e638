"""Every form of the step-time model that was tried, scored alike. scipy is imported by the forms that are not linear.

The form was to be chosen without the larger halves of the curves: by reasoning, and by leaving out one point at a time of the smaller
halves. Both figures stand in the table; docs/estimator.md says how the choice was made.

With W = tokens·(u + v·k/E):

    affine             t0 + W
    no padding         t0 + W of 100 tokens a query, whatever the batch
    roofline           t0 + tokens·u + v·hypot(tokens·k/E, ridge of the GPU)      reading or computing the experts, rounded knee
    sharp roofline     t0 + tokens·u + v·max(tokens·k/E, ridge)
    sum of powers 1.5  (t0^1.5 + W^1.5)^(1/1.5)                                   a floor that work hides behind
    sum of powers 2    hypot(t0, W)
    floor              max(t0, W)

Pooling "curve": three coefficients a curve. "card": curves of one model on one card share all. "chip": cards of one chip share u and v.
"ratio": u/v is one number for a model on all cards; "chip ratio": that, and v belongs to the chip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moejax.errors import UserError
from moejax.study.cost.curves import observations, smaller_half
from moejax.study.cost.step_time import Observations

FloatArray = NDArray[np.float64]
Formula = Callable[[float, float, float, Observations], FloatArray]
NEGLIGIBLE = 1e-4  # pull of the start on log-coefficients: decides only what the data leave open


def _work(u: float, v: float, c: Observations) -> FloatArray:
    return c.tokens * (u + v * c.share)


def _powers(p: float) -> Formula:
    return lambda t0, u, v, c: (t0**p + _work(u, v, c) ** p) ** (1 / p)


FORMS: dict[str, Formula] = {
    "affine": lambda t0, u, v, c: t0 + _work(u, v, c),
    "no padding": lambda t0, u, v, c: t0 + 100 * c.queries * (u + v * c.share),
    "roofline": lambda t0, u, v, c: t0 + c.tokens * u + v * np.hypot(c.tokens * c.share, c.gpu.ridge_flops_per_byte),
    "sharp roofline": lambda t0, u, v, c: t0 + c.tokens * u + v * np.maximum(c.tokens * c.share, c.gpu.ridge_flops_per_byte),
    "sum of powers 1.5": _powers(1.5),
    "sum of powers 2": _powers(2.0),
    "floor": lambda t0, u, v, c: np.maximum(t0, _work(u, v, c)),
}
POOLINGS = ("curve", "card", "chip", "ratio", "chip ratio")


def _layout(curves: Sequence[Observations], pooling: str) -> tuple[list[float], list[tuple[int, int, int]]]:
    """Starting values, and for each curve where its t0, its u (or u/v) and its v stand among them."""
    keys: dict[tuple[str, ...], int] = {}
    starts: list[float] = []

    def place(kind: str, start: float, *key: str) -> int:
        if (kind, *key) not in keys:
            keys[kind, *key] = len(starts)
            starts.append(start)
        return keys[kind, *key]

    places = []
    for c in curves:
        own = (c.name,) if pooling == "curve" else (c.model, c.gpu.name)
        shared = (c.model, c.gpu.chip) if pooling in ("chip", "chip ratio") else own
        t0, v = {"mixtral": (2.0, 2e-3), "blackmamba": (0.4, 2e-4)}[c.model]
        first = place("t0", t0, *own)
        if pooling in ("ratio", "chip ratio"):
            places.append((first, place("u/v", 0.1, c.model), place("v", v, *shared)))
        else:
            places.append((first, place("u", v / 4, *shared), place("v", v, *shared)))
    return starts, places


def fit_form(form: str, pooling: str, curves: Sequence[Observations], loss: str, scales: dict[str, float]) -> list[FloatArray]:
    """(t0, u, v) of each curve, in their order. Loss "seconds": relative; "throughput": each curve's errors over its `scales`."""
    from scipy.optimize import least_squares

    starts, places = _layout(curves, pooling)
    formula = FORMS[form]

    def coefficients(x: FloatArray) -> list[FloatArray]:
        values = np.exp(x)
        ratio = pooling in ("ratio", "chip ratio")
        return [np.array([values[a], values[b] * (values[c] if ratio else 1.0), values[c]]) for a, b, c in places]

    def residuals(x: FloatArray) -> FloatArray:
        parts = []
        for c, (t0, u, v) in zip(curves, coefficients(x), strict=True):
            model = formula(t0, u, v, c)
            parts.append(model / c.seconds - 1 if loss == "seconds" else (c.queries / model - c.throughput) / scales[c.name])
        return np.concatenate([*parts, NEGLIGIBLE * (x - np.log(starts))])

    begin = np.log(starts)
    ratios = np.zeros(len(starts))
    if "ratio" in pooling:
        ratios[[b for _, b, _ in places]] = 1.0
    tries = [least_squares(residuals, begin + shift, max_nfev=3000) for shift in (0.0, -1.2, 0.7, -3.0 * ratios)]
    return coefficients(min(tries, key=lambda t: t.cost).x)


def _seconds(form: str, coefficients: FloatArray, c: Observations) -> FloatArray:
    t0, u, v = coefficients.tolist()
    return FORMS[form](t0, u, v, c)


def _error(form: str, coefficients: FloatArray, c: Observations) -> float:
    return float(np.mean(np.abs(c.seconds / _seconds(form, coefficients, c) - 1)))


def leave_one_out(form: str, pooling: str, curves: Sequence[Observations]) -> dict[str, FloatArray | None]:
    """Curve -> relative error of each point of these (smaller) curves, fitted to all others.

    None where leaving a point out leaves fewer points than coefficients: nothing is known then.
    """
    errors: dict[str, FloatArray | None] = {}
    for curve in curves:
        if pooling == "curve" and len(curve.queries) <= 3:
            errors[curve.name] = None
            continue
        found = []
        for point in range(len(curve.queries)):
            rest = [c.take(np.arange(len(c.queries)) != point) if c is curve else c for c in curves if c.model == curve.model]
            at = [c.name for c in rest].index(curve.name)
            x = fit_form(form, pooling, rest, "seconds", {})[at]
            found.append(_error(form, x, curve.take(np.array([point]))))
        errors[curve.name] = np.array(found)
    return errors


@dataclass(frozen=True)
class Score:
    """A form's figures: RMSE of throughput over the paper's form on whole curves, and mean errors (shares, not percent)."""

    form: str
    pooling: str
    dataset: str
    coefficients: int
    rmse_ratio: dict[str, float]
    left_out: dict[str, FloatArray | None]
    larger_half: dict[str, float]

    @property
    def leave_one_out(self) -> tuple[float, float] | None:
        """Mean over the seven curves and its standard error; None where one of them has no figure."""
        errors = [e for e in self.left_out.values() if e is not None]
        if len(errors) < len(self.left_out):
            return None
        standard = np.sqrt(sum(e.var(ddof=1) / len(e) for e in errors)) / len(errors)
        return float(np.mean([e.mean() for e in errors])), float(standard)

    @property
    def larger_half_mean(self) -> float:
        return float(np.mean(list(self.larger_half.values())))


def score(form: str, pooling: str, dataset: str, paper_rmse: dict[str, float]) -> Score:
    """All three figures of a form. Raises UserError for a form or pooling that was not tried."""
    if form not in FORMS or pooling not in POOLINGS:
        raise UserError(f"form {form!r}, pooling {pooling!r}: expected one of {list(FORMS)} and one of {list(POOLINGS)}")
    curves = observations(dataset)
    whole = fit_form(form, pooling, curves, "throughput", paper_rmse)
    ratios = {}
    for c, x in zip(curves, whole, strict=True):
        ratios[c.name] = float(np.sqrt(np.mean((c.queries / _seconds(form, x, c) - c.throughput) ** 2))) / paper_rmse[c.name]
    small = [c.take(smaller_half(c)) for c in curves]
    halves = fit_form(form, pooling, small, "seconds", {})
    held = {c.name: _error(form, x, c.take(~smaller_half(c))) for c, x in zip(curves, halves, strict=True)}
    return Score(form, pooling, dataset, len(_layout(curves, pooling)[0]), ratios, leave_one_out(form, pooling, small), held)
