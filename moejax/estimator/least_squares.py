"""Least squares with coefficients that are not negative, and their scatter."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from moejax.errors import UserError

FloatArray = NDArray[np.float64]
RESAMPLES = 400


def nonnegative(features: FloatArray, target: FloatArray) -> FloatArray:
    """argmin |features·x - target|² over x >= 0. features: [points, coefficients]."""
    from scipy.optimize import nnls  # takes longer to import than `predict` may

    scale = np.linalg.norm(features, axis=0)
    scale[scale == 0] = 1.0
    return np.asarray(nnls(features / scale, target)[0]) / scale


def fit_seconds(features: FloatArray, seconds: FloatArray) -> FloatArray:
    """Coefficients x >= 0 of seconds = features·x by the smallest relative errors: each point weighs 1/seconds²."""
    _enough(features)
    return nonnegative(features / seconds[:, None], np.ones_like(seconds))


def spread(seconds: FloatArray, scatter: FloatArray, level: float) -> tuple[float, float]:
    """Quantiles of every sampled time with every draw of scatter on it."""
    outcomes = np.outer(seconds.ravel(), 1 + scatter)
    low, high = np.quantile(outcomes, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def resampled(
    matrix: FloatArray, seconds: FloatArray, x: FloatArray, resamples: int, solve: Callable[[FloatArray], FloatArray]
) -> tuple[FloatArray, FloatArray]:
    """(samples [resamples, coefficients], scatter [resamples]) of a fit x of seconds = matrix·x: relative residuals drawn again and
    refitted. Both are empty where fewer than two points exceed the coefficients, or for 0 resamples."""
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
    refitted = np.array([solve(again) for again in model * (1 + wide[draws])])
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
