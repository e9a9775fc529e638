"""Least squares with coefficients that are not negative, and their scatter, in numpy: scipy.optimize alone takes longer to import than
`predict` may.

Seconds are linear in the coefficients, and there are few: the exact minimum is the best of the unconstrained minima over the subsets
of coefficients that are not zero, so subsets are tried instead of iterating.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from moejax.errors import UserError

FloatArray = NDArray[np.float64]
RESAMPLES = 400


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


def spread(seconds: FloatArray, scatter: FloatArray, level: float) -> tuple[float, float]:
    """Quantiles of every sampled time with every draw of scatter on it."""
    outcomes = np.outer(seconds.ravel(), 1 + scatter)
    low, high = np.quantile(outcomes, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def resampled(
    matrix: FloatArray, seconds: FloatArray, x: FloatArray, resamples: int, solve: Callable[[FloatArray], FloatArray] | None = None
) -> tuple[FloatArray, FloatArray]:
    """(samples [resamples, coefficients], scatter [resamples]) of a fit x of seconds = matrix·x: relative residuals drawn again and
    refitted (by `solve`, or by relative errors). Both are empty where fewer than two points exceed the coefficients, or for 0 resamples."""
    model = matrix @ x
    spare = len(seconds) - matrix.shape[1]
    if not resamples or spare < 2:
        return np.zeros((0, len(x))), np.zeros(0)
    residuals = seconds / model - 1
    deviation = float(np.sqrt(np.sum(residuals**2) / spare))
    wide = (residuals - residuals.mean()) * np.sqrt(len(seconds) / spare)
    generator = np.random.default_rng(0)
    draws = generator.integers(len(seconds), size=(resamples, len(seconds)))
    # The deviation itself is known from few points: dividing by a drawn chi makes Student's t of both kinds of error.
    unknown = np.sqrt(spare / generator.chisquare(spare, size=(2, resamples)))
    drawn = model * (1 + wide[draws])
    refitted = fit_seconds_many(matrix, drawn) if solve is None else np.array([solve(again) for again in drawn])
    samples = np.maximum(x + unknown[0][:, None] * (refitted - x), 0.0)
    return samples, np.maximum(deviation * unknown[1] * generator.standard_normal(resamples), -0.99)


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
