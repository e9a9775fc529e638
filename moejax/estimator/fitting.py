"""Coefficients from measured runs of one model: our model's t0, u, v, and the study's equations 1 and 2, with their errors.

The runs come as plain figures: the command line reads their step_profile.json. Several devices are fitted each on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moejax.errors import UserError
from moejax.estimator.coefficients import Entry, Range
from moejax.estimator.equations import fit_equation2
from moejax.estimator.least_squares import RESAMPLES, FloatArray, fit_seconds, nonnegative, resampled
from moejax.estimator.roofline import STUDY_MODELS
from moejax.gpus import gpu_name

C3 = {"mixtral": 1.8, "blackmamba": 2.5}  # fixed by the study's artifact, one per model
COEFFICIENTS = 3  # t0, u, v
TRUSTED_ERROR = 0.15  # of one of its own runs; on a quiet machine predictions miss by 2.4 % at most


def model_name(model: str) -> str:
    """`predict`'s name of a model (a Hub id, a folder or a preset), or its own."""
    return next((known for known, (preset, _) in STUDY_MODELS.items() if preset in model.lower()), model)


@dataclass(frozen=True)
class Run:
    """One measured run, per optimizer step. Bytes None: not known."""

    path: str
    framework: str
    device: str  # as jax or torch names it
    model: str
    parameters: int | None
    method: str
    experts: int
    top_k: int
    queries: float
    tokens: float
    seconds: float
    peak_bytes: int | None
    argument_bytes: int | None
    precision: str | None = None
    remat: str | None = None
    row_tokens: int | None = None

    @property
    def share(self) -> float:
        return self.top_k / self.experts

    @property
    def gpu(self) -> str:
        return gpu_name(self.device)

    @property
    def known_model(self) -> str:
        return model_name(self.model)


@dataclass(frozen=True)
class Fitted:
    """One device's coefficients. `errors`: predicted over measured seconds less 1, by run, in the order of `runs`."""

    entry: Entry
    runs: tuple[Run, ...]
    errors: tuple[float, ...]
    equation_1: dict[str, Any] | None
    equation_2: dict[str, Any] | None


def fit_runs(runs: Sequence[Run]) -> tuple[Fitted, ...]:
    """Raises UserError for runs of different models, and for fewer points than coefficients (how many are missing)."""
    _one_model(runs)
    devices: dict[str, list[Run]] = {}
    for run in runs:
        devices.setdefault(run.gpu, []).append(run)
    return tuple(_fit_device(gpu, of_device) for gpu, of_device in devices.items())


def _one_model(runs: Sequence[Run]) -> None:
    for what in ("model", "parameters", "method", "framework", "experts", "precision", "remat"):
        found: dict[Any, str] = {}
        for run in runs:
            found.setdefault(getattr(run, what), run.path)
        if len(found) > 1:
            told = "; ".join(f"{value}: {path}" for value, path in found.items())
            raise UserError(f"runs of different {what} cannot be fitted together ({told}): give the runs of one model")


def _fit_device(gpu: str, runs: list[Run]) -> Fitted:
    keys = ("queries", "tokens", "share", "seconds")
    queries, tokens, share, seconds = (np.array([getattr(r, key) for r in runs], float) for key in keys)
    points = len({(r.tokens, r.share) for r in runs})
    only = runs[0].share if len(set(share.tolist())) == 1 else None
    if only is None or points == 1:
        needed, matrix = COEFFICIENTS, np.column_stack([np.ones_like(tokens), tokens, tokens * share])
    else:  # one k: what it adds to a token cannot be told from the rest
        needed, matrix = COEFFICIENTS - 1, np.column_stack([np.ones_like(tokens), tokens])
    if points < needed:
        raise UserError(
            f"{gpu}: {points} data point{'s' * (points != 1)} for {needed} coefficients: {needed - points} missing. Profile runs with "
            "other batch sizes, and with another number of experts per token (without one two batch sizes do, for two coefficients)"
        )
    x = fit_seconds(matrix, seconds)
    samples, scatter = resampled(matrix, seconds, x, RESAMPLES, lambda again: fit_seconds(matrix, again))
    errors = (matrix @ x) / seconds - 1
    if needed < COEFFICIENTS:
        x, samples = np.append(x, 0.0), np.hstack([samples, np.zeros((len(samples), 1))])
    first, rows = runs[0], [r.row_tokens for r in runs if r.row_tokens]
    entry = Entry(
        first.known_model, first.method, gpu, x, samples, scatter, f"{len(runs)} runs, {first.framework}", points, only, first.framework,
        Range((tokens.min(), tokens.max()), (share.min(), share.max()), max(rows, default=None)), _doubt(errors, x),
    )  # fmt: skip
    return Fitted(entry, tuple(runs), tuple(errors.tolist()), _equation_1(runs), _equation_2(first.known_model, queries, share, seconds))


def _doubt(errors: FloatArray, x: FloatArray) -> str | None:
    """Why coefficients should not be trusted that were fitted with these errors."""
    if (worst := np.abs(errors).max()) > TRUSTED_ERROR:
        return f"they miss their own runs by up to {worst:.0%} ({np.abs(errors).mean():.0%} in the mean)"
    return None if x[1:].any() else "the time of their runs does not grow with the tokens"


def _equation_1(runs: Sequence[Run]) -> dict[str, Any] | None:
    """C0 and C1 of batch = C0·(GPU - model)/(tokens·((1 - C1) + C1·sparsity)), read backwards: GB beyond the step's arguments, which stand
    for the model, are tokens·((1 - C1) + C1·sparsity)/C0. With one sparsity C1 is unknown, and C0 holds at that sparsity only."""
    known = [(r.tokens, r.share, (r.peak_bytes - r.argument_bytes) / 1e9) for r in runs if r.peak_bytes and r.argument_bytes]
    if not known or min(gb for *_, gb in known) <= 0:
        return None
    tokens, share, gb = (np.array(column) for column in zip(*known, strict=True))
    one = len(set(share.tolist())) == 1
    x = nonnegative(tokens[:, None] if one else np.column_stack([tokens, tokens * share]), gb)
    if not x.sum() > 0:
        return None
    model = tokens * x[0] if one else tokens * (x[0] + x[1] * share)
    return {
        "c0": float(1 / x.sum()), "c1": None if one else float(x[1] / x.sum()), "sparsity": float(share[0]) if one else None,
        "model_gb": float(np.mean([r.argument_bytes for r in runs if r.argument_bytes])) / 1e9,
        "rmse_gb": float(np.sqrt(np.mean((model - gb) ** 2))), "points": len(gb),
    }  # fmt: skip


def _equation_2(model: str, queries: FloatArray, share: FloatArray, seconds: FloatArray) -> dict[str, Any] | None:
    """C2, C3 (fixed) and C4 of both forms, with their RMSE in queries per second."""
    if len(set(queries.tolist())) < 2:
        return None
    c3 = C3.get(model, C3["blackmamba" if "mamba" in model.lower() else "mixtral"])
    rate = queries / seconds
    found: dict[str, Any] = {}
    for form in ("printed", "fitted"):
        e = fit_equation2(form, queries, share, rate, c3)  # type: ignore[arg-type]
        rmse = float(np.sqrt(np.mean((e.throughput(queries, share) - rate) ** 2)))
        found[form] = {"c2": e.c2, "c3": e.c3, "c4": e.c4, "rmse_queries_per_second": rmse}
    return found
