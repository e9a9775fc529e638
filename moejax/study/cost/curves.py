"""The study's seven throughput curves as observations of steps, and what our model says about them.

Lengths of Figure 15's three curves: the artifact titles them commonsense and names their files math. MATH is taken here, for reasons
that no throughput enters: they end at batch 1 and 3 on the A100 of 40 GB, where Figure 13 has room for 6 commonsense queries and
equation 1 for 1 and 3 MATH queries; at 17 on 80 GB, where Figure 13 has room for 27; and Table IV uses their last points for MATH.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from moejax import gpus
from moejax.estimator import lengths, transfer
from moejax.estimator.coefficients import Entry, Range
from moejax.estimator.least_squares import RESAMPLES
from moejax.estimator.lengths import STUDY_CUTOFF
from moejax.study import reference
from moejax.study.cost.step_time import Observations, features, fit, predicted

GPU_NAMES = {"a40": "A40", "a100-40gb": "A100-40", "a100-80gb": "A100-80", "h100-80gb": "H100"}
FIGURE_15_DATASET = "math_14k"
SOURCE_CURVE = "a40/mixtral/commonsense_15k"


def observations(figure_15_dataset: str = FIGURE_15_DATASET) -> tuple[Observations, ...]:
    """The seven curves in the paper's order, tokens by Figure 2's lengths and the study's padding."""
    found = []
    for curve in reference.curves():
        length = lengths.of_study(curve.dataset or figure_15_dataset)
        kinds, batches, rates = zip(*curve.points, strict=True)
        queries = np.array(batches, float)
        tokens = np.array([length.batch_tokens(b) for b in batches])
        share = np.array([reference.EXPERTS_PER_TOKEN[kind] / reference.EXPERTS for kind in kinds])
        seconds = queries / np.array(rates)
        found.append(Observations(curve.name, curve.model, gpus.find(GPU_NAMES[curve.gpu]), queries, tokens, share, seconds))
    return tuple(found)


def smaller_half(curve: Observations) -> NDArray[np.bool_]:
    """Which points belong to the smaller half of their k's batch sizes, rounded up."""
    mask = np.zeros(len(curve.queries), bool)
    for share in np.unique(curve.share):
        index = np.flatnonzero(curve.share == share)
        order = index[np.argsort(curve.queries[index], kind="stable")]
        mask[order[: -(-len(order) // 2)]] = True
    return mask


@cache
def study_fits() -> dict[str, Entry]:
    """Curve -> our model fitted to the study's seconds, pooled by chip, with bootstrap samples."""
    return fit(observations(), resamples=RESAMPLES)


def whole_curve_rmse() -> dict[str, float]:
    """Curve -> RMSE in queries per second, fitted to the throughput of all its points."""
    fits = fit(observations(), loss="throughput")
    return {c.name: float(np.sqrt(np.mean((c.queries / predicted(fits[c.name], c) - c.throughput) ** 2))) for c in observations()}


def larger_half_error() -> dict[str, float]:
    """Curve -> mean relative error of throughput at the larger half of its batch sizes, fitted to the smaller half."""
    fits = fit([c.take(smaller_half(c)) for c in observations()])
    held = [c.take(~smaller_half(c)) for c in observations()]
    return {c.name: float(np.mean(np.abs(c.seconds / predicted(fits[c.name], c) - 1))) for c in held}


def coverage(level: float = 0.95) -> tuple[int, int]:
    """(points of the larger halves inside the interval that the smaller halves give, points that have an interval)."""
    data = observations()
    fits = fit([c.take(smaller_half(c)) for c in data], resamples=RESAMPLES)
    inside = total = 0
    for curve in data:
        held = curve.take(~smaller_half(curve))
        for tokens, share, seconds in zip(held.tokens, held.share, held.seconds, strict=True):
            interval = fits[curve.name].interval(tokens, share, level)
            if interval is not None:
                total += 1
                inside += interval[0] <= seconds <= interval[1]
    return int(inside), total


def transfer_errors() -> dict[tuple[str, transfer.Rule], tuple[float, float]]:
    """(curve, rule) -> (mean relative error of throughput, mean signed one) of the A40's coefficients on the other GPUs' curves."""
    source = study_fits()[SOURCE_CURVE]
    found = {}
    for curve in observations():
        if curve.gpu.name == source.gpu:
            continue
        for rule in transfer.RULES:
            x = source.coefficients * transfer.factors(gpus.find(source.gpu), curve.gpu, rule)
            relative = curve.seconds / (features(curve.tokens, curve.share) @ x) - 1  # of queries per second
            found[curve.name, rule] = float(np.abs(relative).mean()), float(relative.mean())
    return found


def entries() -> tuple[Entry, ...]:
    """From the seven published curves: Mixtral by QLoRA on four GPUs, BlackMamba's full fine-tuning on the A40: what
    `predict` uses (`publish.py`)."""
    curves: dict[tuple[str, str], list[Observations]] = {}
    for curve in observations():
        curves.setdefault((curve.model, curve.gpu.name), []).append(curve)
    made = {}
    for entry in study_fits().values():
        key = entry.model, entry.gpu
        tokens, shares = (np.concatenate([getattr(c, what) for c in curves[key]]) for what in ("tokens", "share"))
        made[key] = replace(entry, range=Range((tokens.min(), tokens.max()), (shares.min(), shares.max()), STUDY_CUTOFF))
    return tuple(made.values())
