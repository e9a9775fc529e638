"""The cost model of arXiv 2408.04693, section V: how many queries fit, and how fast they go.

Sparsity is what the paper calls so: the share k/E of the experts that a token visits (1 for dense). Batch sizes are in queries,
memory in GB of 1e9 bytes, throughput in queries per second.

    equation 1           batch = floor(C0·(gpu_gb - model_gb) / (tokens·((1 - C1) + C1·sparsity)))
    equation 2, printed  throughput = C2·ln(batch / (sparsity·C3)) + C4
    equation 2, fitted   throughput = C2·ln(batch^(1/(sparsity·C3))) + C4        C3 fixed: 1.8 Mixtral, 2.5 BlackMamba

The artifact's plots fit the second form. In the first, C3 and C4 cannot be distinguished (C2·ln C3 is a constant like C4), so C3 stays
at the artifact's value there too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moejax.errors import UserError

Form = Literal["printed", "fitted"]
FloatArray = NDArray[np.float64]


def max_batch_raw(gpu_gb: float, model_gb: float, tokens: float, sparsity: float, c0: float, c1: float) -> float:
    """Equation 1 before it is rounded down. Raises UserError for sizes that are not positive."""
    for name, value in (("GPU memory", gpu_gb), ("tokens a query", tokens), ("sparsity", sparsity)):
        if not value > 0:
            raise UserError(f"{name} = {value:g}: expected more than 0")
    return c0 * (gpu_gb - model_gb) / (tokens * ((1 - c1) + c1 * sparsity))


def max_batch(gpu_gb: float, model_gb: float, tokens: float, sparsity: float, c0: float, c1: float) -> int:
    """Equation 1: the largest batch in queries, 0 where nothing fits."""
    return max(0, math.floor(max_batch_raw(gpu_gb, model_gb, tokens, sparsity, c0, c1)))


@dataclass(frozen=True)
class Equation2:
    """A fit of equation 2: `c2`, `c4` by least squares on throughput, `c3` fixed."""

    form: Form
    c2: float
    c3: float
    c4: float

    def throughput(self, batch: FloatArray, sparsity: FloatArray) -> FloatArray:
        """Queries per second."""
        return self.c4 + self.c2 * _regressor(self.form, np.asarray(batch, float), np.asarray(sparsity, float), self.c3)


def _regressor(form: Form, batch: FloatArray, sparsity: FloatArray, c3: float) -> FloatArray:
    return np.log(batch) / (sparsity * c3) if form == "fitted" else np.log(batch / (sparsity * c3))


def fit_equation2(form: Form, batch: FloatArray, sparsity: FloatArray, queries_per_second: FloatArray, c3: float) -> Equation2:
    """Least squares on throughput. Raises UserError for fewer points than coefficients."""
    if len(batch) < 2:
        raise UserError(f"equation 2 has 2 free coefficients and {len(batch)} points: {2 - len(batch)} missing")
    x = _regressor(form, np.asarray(batch, float), np.asarray(sparsity, float), c3)
    (c4, c2), *_ = np.linalg.lstsq(np.column_stack([np.ones_like(x), x]), np.asarray(queries_per_second, float), rcond=None)
    return Equation2(form, float(c2), c3, float(c4))
