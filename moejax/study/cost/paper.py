"""The study's fits of its own cost model (`estimator/equations.py`), as printed and as its artifact computed them."""

from __future__ import annotations

import numpy as np

from moejax.estimator.equations import Equation2, FloatArray, Form, fit_equation2
from moejax.study import reference


def arrays(curve: reference.Curve) -> tuple[FloatArray, FloatArray, FloatArray]:
    """(batch, sparsity, queries per second) of a published curve, dense points first."""
    batch = np.array([b for _, b, _ in curve.points], float)
    sparsity = np.array([1.0 if kind == "dense" else 0.25 for kind, _, _ in curve.points])
    return batch, sparsity, np.array([rate for _, _, rate in curve.points])


def fit_curve(curve: reference.Curve, form: Form) -> Equation2:
    """Equation 2 fitted to all points of a published curve."""
    return fit_equation2(form, *arrays(curve), curve.c3)


def rmse(curve: reference.Curve, fit: Equation2) -> float:
    """Root of the mean squared error in queries per second, every point scored with the formula that was fitted."""
    batch, sparsity, rate = arrays(curve)
    return float(np.sqrt(np.mean((fit.throughput(batch, sparsity) - rate) ** 2)))


def rmse_as_printed(curve: reference.Curve) -> float:
    """The RMSE that the figures print: the fit of the artifact, its dense points scored without the exponent 1/(sparsity·C3).

    For the H100 only the first dense point is scored so; the others are scored with the sparse exponent, as the artifact does.
    """
    fit = fit_curve(curve, "fitted")
    batch, sparsity, rate = arrays(curve)
    predicted = fit.throughput(batch, sparsity)
    dense = np.flatnonzero(sparsity == 1.0)
    without_exponent = fit.c4 + fit.c2 * np.log(batch)
    if curve.gpu.startswith("h100"):
        predicted[dense] = fit.throughput(batch, np.full_like(sparsity, 0.25))[dense]
        dense = dense[:1]
    predicted[dense] = without_exponent[dense]
    return float(np.sqrt(np.mean((predicted - rate) ** 2)))
