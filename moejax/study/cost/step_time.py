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

from moejax.estimator.coefficients import Entry
from moejax.estimator.least_squares import FloatArray, fit_seconds, resampled
from moejax.estimator.roofline import STUDY_MODELS
from moejax.gpus import GPU

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


def predicted(entry: Entry, curve: Observations) -> FloatArray:
    """Seconds at the points of a curve."""
    return features(curve.tokens, curve.share) @ entry.coefficients


def fit_throughput(features: FloatArray, seconds: FloatArray, queries: FloatArray) -> FloatArray:
    """Coefficients x >= 0 by least squares on queries per second, queries/(features·x), beginning at `fit_seconds`' answer."""
    from scipy.optimize import least_squares

    start, rate = fit_seconds(features, seconds), queries / seconds
    unit = np.linalg.norm(features, axis=0)  # coefficients differ by a factor of a million
    matrix = features / unit
    found = least_squares(
        lambda x: queries / (matrix @ x) - rate, start * unit, lambda x: -(queries / (matrix @ x) ** 2)[:, None] * matrix,
        bounds=(0, np.inf), x_scale="jac", ftol=1e-15, xtol=1e-15, gtol=1e-15,
    )  # fmt: skip
    return found.x / unit


def fit(curves: Sequence[Observations], *, loss: Loss = "seconds", resamples: int = 0) -> dict[str, Entry]:
    """Curve name -> its coefficients. Loss "seconds": relative errors of the time, per-token work pooled by model and chip and t0 by card;
    "throughput": squared errors of queries per second, each curve on its own.

    `samples` is [resamples, 3] and `scatter` [resamples]; both are empty where there are fewer than two points more than coefficients:
    then nothing is known about the error. Raises UserError where points are fewer than coefficients.
    """
    groups: dict[tuple[str, ...], list[Observations]] = {}
    for curve in curves:
        groups.setdefault((curve.name,) if loss == "throughput" else (curve.model, curve.gpu.chip), []).append(curve)
    return {name: entry for group in groups.values() for name, entry in _fit_group(group, loss, resamples).items()}


def _fit_group(group: list[Observations], loss: Loss, resamples: int) -> dict[str, Entry]:
    cards = list(dict.fromkeys(curve.gpu.name for curve in group))
    matrix = np.vstack([
        np.hstack([np.outer(np.ones(len(c.queries)), [c.gpu.name == card for card in cards]), features(c.tokens, c.share)[:, 1:]])
        for c in group
    ])  # fmt: skip
    seconds, queries = (np.concatenate([getattr(c, what) for c in group]) for what in ("seconds", "queries"))

    def solve(measured: FloatArray) -> FloatArray:
        return fit_seconds(matrix, measured) if loss == "seconds" else fit_throughput(matrix, measured, queries)

    x = solve(seconds)
    samples, scatter = resampled(matrix, seconds, x, resamples, solve)
    found = {}
    for curve in group:
        columns = [cards.index(curve.gpu.name), len(cards), len(cards) + 1]
        of_card = sum(len(c.queries) for c in group if c.gpu.name == curve.gpu.name)
        found[curve.name] = Entry(
            curve.model, STUDY_MODELS[curve.model][1], curve.gpu.name, x[columns], samples[:, columns], scatter,
            "the study's curves, PyTorch", of_card, framework="pytorch",
        )  # fmt: skip
    return found
