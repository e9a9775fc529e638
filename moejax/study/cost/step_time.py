"""Our model of a step's time, its fit and its uncertainty.

    seconds = t0 + tokens·(u + v·k/E)

`tokens` are those that the batching really computes, padding included (`lengths.py`). t0 is what a step costs whatever the batch:
dequantizing or reading every weight, launching kernels, the optimizer. u is a token's work outside the experts, v its work if it
visited all of them; k/E is the share that it visits. All three are at least 0, so more tokens or more experts never take less time.
What curves share is pooled: a model's per-token work belongs to the chip, t0 to the card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moejax.errors import UserError
from moejax.estimator.least_squares import FloatArray, fit_seconds, resampled, spread
from moejax.gpus import GPU

Pooling = Literal["curve", "chip"]
Loss = Literal["seconds", "throughput"]


@dataclass(frozen=True)
class Observations:
    """Measured steps of one model on one GPU: a curve. All arrays are [points]."""

    name: str
    model: str
    gpu: GPU
    queries: FloatArray
    tokens: FloatArray  # computed by the step, padding included
    share: FloatArray  # k/E
    seconds: FloatArray

    def __post_init__(self) -> None:
        for what in ("queries", "tokens", "share", "seconds"):
            if not (getattr(self, what) > 0).all():
                raise UserError(f"{self.name}: {what} of every measured step must be above 0")

    def take(self, index: NDArray[np.int64] | NDArray[np.bool_]) -> Observations:
        """These points only."""
        part = {key: getattr(self, key)[index] for key in ("queries", "tokens", "share", "seconds")}
        return Observations(self.name, self.model, self.gpu, **part)

    @property
    def throughput(self) -> FloatArray:
        return self.queries / self.seconds


def features(tokens: FloatArray, share: FloatArray) -> FloatArray:
    """[points, 3]: what the coefficients multiply."""
    return np.column_stack([np.ones_like(tokens), tokens, tokens * share])


@dataclass(frozen=True)
class Fit:
    """A curve's coefficients x >= 0 of features·x, bootstrap samples of them, and draws of one step's relative scatter about the law.

    `samples` is [resamples, 3] and `scatter` [resamples]; both are empty where there are fewer than two points more than coefficients:
    then nothing is known about the error.
    """

    model: str
    gpu: GPU
    coefficients: FloatArray
    samples: FloatArray
    scatter: FloatArray

    def seconds(self, tokens: FloatArray, share: FloatArray) -> FloatArray:
        """Predicted step seconds, [points]."""
        return features(tokens, share) @ self.coefficients

    def of(self, observed: Observations) -> FloatArray:
        """Predicted seconds at the points of a curve."""
        return self.seconds(observed.tokens, observed.share)

    def interval(self, tokens: float, share: float, level: float = 0.95) -> tuple[float, float] | None:
        """Seconds between which one more measured step would lie: the coefficients' uncertainty and the scatter of points. Or None."""
        if not len(self.samples):
            return None
        one = features(np.array([float(tokens)]), np.array([float(share)]))
        return spread(one @ self.samples.T, self.scatter, level)


def fit_throughput(features: FloatArray, seconds: FloatArray, queries: FloatArray, scale: FloatArray | None = None) -> FloatArray:
    """Coefficients x >= 0 by least squares on queries per second, queries/(features·x), beginning at `fit_seconds`' answer.

    `scale`: what a unit of error is at each point, where curves of unlike throughput are fitted together.
    """
    from scipy.optimize import least_squares

    start, rate = fit_seconds(features, seconds), queries / seconds
    unit = np.linalg.norm(features, axis=0)  # coefficients differ by a factor of a million
    matrix = features / unit
    found = least_squares(
        lambda x: (queries / (matrix @ x) - rate) / (1.0 if scale is None else scale), start * unit,
        lambda x: -(queries / (matrix @ x) ** 2 / (1.0 if scale is None else scale))[:, None] * matrix,
        bounds=(0, np.inf), x_scale="jac", ftol=1e-15, xtol=1e-15, gtol=1e-15,
    )  # fmt: skip
    return found.x / unit


def _groups(curves: Sequence[Observations], pooling: Pooling) -> list[list[Observations]]:
    """Curves that share per-token work."""
    groups: dict[tuple[str, ...], list[Observations]] = {}
    for curve in curves:
        key = (curve.name,) if pooling == "curve" else (curve.model, curve.gpu.chip)
        groups.setdefault(key, []).append(curve)
    return list(groups.values())


def fit(
    curves: Sequence[Observations],
    *,
    pooling: Pooling = "chip",
    loss: Loss = "seconds",
    scales: dict[str, float] | None = None,
    resamples: int = 0,
) -> dict[str, Fit]:
    """Curve name -> Fit. Loss "seconds": relative errors of the time; "throughput": squared errors of queries per second, each curve's
    over its `scales` entry (by default the curve's highest throughput), so that curves of one group weigh alike.

    Raises UserError where points are fewer than coefficients.
    """
    fits: dict[str, Fit] = {}
    for group in _groups(curves, pooling):
        fits |= _fit_group(group, pooling, loss, scales or {}, resamples)
    return fits


def _fit_group(
    group: list[Observations], pooling: Pooling, loss: Loss, scales: dict[str, float], resamples: int
) -> dict[str, Fit]:
    cards = [curve.name if pooling == "curve" else curve.gpu.name for curve in group]
    starts = list(dict.fromkeys(cards))
    rows = []
    for curve, card in zip(group, cards, strict=True):
        own = features(curve.tokens, curve.share)
        t0 = np.zeros((len(own), len(starts)))
        t0[:, starts.index(card)] = own[:, 0]
        rows.append(np.hstack([t0, own[:, 1:]]))
    matrix = np.vstack(rows)
    seconds = np.concatenate([c.seconds for c in group])
    queries = np.concatenate([c.queries for c in group])
    unit = np.concatenate([np.full(len(c.queries), scales.get(c.name, float(c.throughput.max()))) for c in group])

    def solve(measured: FloatArray) -> FloatArray:
        return fit_seconds(matrix, measured) if loss == "seconds" else fit_throughput(matrix, measured, queries, unit)

    x = solve(seconds)
    samples, scatter = resampled(matrix, seconds, x, resamples, solve)
    found = {}
    for curve, card in zip(group, cards, strict=True):
        columns = [starts.index(card), len(starts), len(starts) + 1]
        found[curve.name] = Fit(curve.model, curve.gpu, x[columns], samples[:, columns], scatter)
    return found
