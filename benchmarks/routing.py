"""Which experts tokens choose in the benchmarks of the grouped matmul."""

from __future__ import annotations

import numpy as np

# The study's Figure 11: one expert with three times its share.
SKEWED = (0.375, 0.15, 0.125, 0.1, 0.1, 0.075, 0.05, 0.025)


def experts_of(tokens: int, experts: int, k: int, loads: tuple[float, ...] | None) -> np.ndarray:
    """int32 [N, K]: k different experts a token, drawn by these loads."""
    rng = np.random.default_rng(0)
    weights = np.ones(experts) / experts if loads is None else np.asarray(loads)
    noise = np.log(weights) + rng.gumbel(size=(tokens, experts))
    return np.argsort(-noise, axis=1)[:, :k].astype(np.int32)
