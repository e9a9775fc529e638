"""Least squares with coefficients that are not negative, in numpy: scipy.optimize alone takes longer to import than `predict` may.

Seconds are linear in the coefficients, and there are few: the exact minimum is the best of the unconstrained minima over the subsets
of coefficients that are not zero, so subsets are tried instead of iterating.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from moejax.errors import UserError

FloatArray = NDArray[np.float64]


def nonnegative(features: FloatArray, target: FloatArray) -> FloatArray:
    """argmin |features·x - target|² over x >= 0, exact. features: [points, coefficients]."""
    scale = np.linalg.norm(features, axis=0)
    scale[scale == 0] = 1.0
    a = features / scale
    count = a.shape[1]
    best, best_cost = np.zeros(count), float(target @ target)
    for size in range(count, 0, -1):
        for chosen in combinations(range(count), size):
            part, *_ = np.linalg.lstsq(a[:, chosen], target, rcond=None)
            if (part < 0).any():
                continue
            residual = a[:, chosen] @ part - target
            cost = float(residual @ residual)
            if size == count:  # the unconstrained minimum is allowed: nothing is lower
                return part / scale
            if cost < best_cost * (1 - 1e-12):
                best, best_cost = np.zeros(count), cost
                best[list(chosen)] = part
    return best / scale


def fit_seconds(features: FloatArray, seconds: FloatArray) -> FloatArray:
    """Coefficients x >= 0 of seconds = features·x by the smallest relative errors: each point weighs 1/seconds²."""
    _enough(features)
    return nonnegative(features / seconds[:, None], np.ones_like(seconds))


def fit_seconds_many(features: FloatArray, seconds: FloatArray) -> FloatArray:
    """`fit_seconds` of many measurements at once: seconds [many, points] -> coefficients [many, coefficients].

    By normal equations of scaled columns, all in one call; `fit_seconds` itself where that makes a coefficient negative.
    """
    _enough(features)
    scale = np.linalg.norm(features / seconds.mean(axis=0)[:, None], axis=0)
    a = features / scale / seconds[:, :, None]
    x = np.linalg.solve(a.transpose(0, 2, 1) @ a, a.sum(axis=1)[:, :, None])[:, :, 0] / scale
    for index in np.flatnonzero((x < 0).any(axis=1)):
        x[index] = fit_seconds(features, seconds[index])
    return x


def fit_throughput(features: FloatArray, seconds: FloatArray, queries: FloatArray, scale: FloatArray | None = None) -> FloatArray:
    """Coefficients x >= 0 by least squares on queries per second, queries/(features·x); Gauss-Newton from `fit_seconds`' answer.

    `scale`: what a unit of error is at each point, where curves of unlike throughput are fitted together.
    """
    rate = queries / seconds
    weight = 1.0 / (np.ones_like(rate) if scale is None else scale)
    x = fit_seconds(features, seconds)

    def cost(candidate: FloatArray) -> float:
        model = features @ candidate
        return float(np.sum((weight * (queries / model - rate)) ** 2)) if (model > 0).all() else np.inf

    for _ in range(100):
        model = features @ x
        slope = weight * queries / model**2
        # queries/t is queries/model - queries/model²·(t - model) near the present x: linear in the coefficients again.
        proposal = nonnegative(features * slope[:, None], slope * model + weight * (queries / model - rate))
        step = 1.0
        while cost(x + step * (proposal - x)) > cost(x) and step > 1e-6:
            step /= 2
        change = step * (proposal - x)
        x = x + change
        if np.max(np.abs(change) / (np.abs(x) + 1e-12)) < 1e-9:
            break
    return x


def _enough(features: FloatArray) -> None:
    """Raises UserError for fewer points than coefficients, or settings too alike to tell the coefficients apart."""
    points, coefficients = features.shape
    if points < coefficients:
        raise UserError(
            f"{points} data point{'s' * (points != 1)} for {coefficients} coefficients: {coefficients - points} missing. "
            "Measure other batch sizes, and at least one with another number of experts per token"
        )
    scale = np.linalg.norm(features, axis=0)
    used = scale > 0
    if np.linalg.matrix_rank(features[:, used] / scale[used], tol=1e-9) < used.sum() or not used.all():
        raise UserError(
            f"{points} data points cannot tell {coefficients} coefficients apart: measure at least two batch sizes, and at least one "
            "point with another number of experts per token"
        )
