"""What step_profile.json says of the steps of a run, in either framework: from their records, as metrics.jsonl has them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np

Records = list[dict[str, Any]]


def batch(batching: str, traced: Records) -> dict[str, Any]:
    """`schema.Batch`. shape in the records: of the batch, [A, rows, T]."""
    shapes = [record["shape"] for record in traced]
    counted = {"queries": "queries", "tokens": "padded_tokens", "real_tokens": "real_tokens", "supervised_tokens": "supervised_tokens"}
    means = {name: fmean(record[own] for record in traced) for name, own in counted.items()}
    rows, row_tokens = fmean(a * rows for a, rows, _ in shapes), fmean(tokens for _, _, tokens in shapes)
    return {"batching": batching, "rows": rows, "row_tokens": row_tokens} | means


def step_seconds(seconds: list[float]) -> dict[str, Any]:
    """`schema.StepSeconds`, of steps that were not traced."""
    p10, median, p90 = (float(p) for p in np.percentile(seconds, (10, 50, 90))) if seconds else (None, None, None)
    return {"median": median, "p10": p10, "p90": p90, "n": len(seconds)}


def expert_load(traced: Records, layers: Sequence[int]) -> dict[str, list[float]]:
    """Layer, by the model's own number of it -> tokens per expert, mean over the traced steps."""
    counts = np.mean([record["expert_counts"] for record in traced], axis=0)
    return {str(layer): [float(c) for c in row] for layer, row in zip(layers, counts, strict=True)}


def imbalance(expert_load: dict[str, list[float]], devices: int) -> dict[str, float]:
    """Layer -> tokens of the busiest device's experts over the mean device's, where each holds as many experts, in their order."""
    found = {}
    for layer, load in expert_load.items():
        of_devices = np.asarray(load).reshape(devices, -1).sum(axis=1)
        found[layer] = float(of_devices.max() / of_devices.mean()) if of_devices.any() else 1.0
    return found
