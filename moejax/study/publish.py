"""`python -m moejax.study.publish`: the paper's numbers that the tool answers with, written into the tool's package data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moejax.estimator import coefficients, published
from moejax.estimator.lengths import STUDY_CUTOFF, of_study
from moejax.profiling import bars
from moejax.study import reference
from moejax.study.cost.curves import FIGURE_15_DATASET, GPU_NAMES, entries
from moejax.study.reference import REFERENCE

# The study's names of kernels and layers, in ours. Its BlackMamba's w1 holds both input projections, as ours does in w1 and w3.
_KERNELS = {
    "matmul(w1)": "moe/w1", "matmul(w2)": "moe/w2", "matmul(w3)": "moe/w3", "w1_dequant": "moe/w1_dequant",
    "w2_dequant": "moe/w2_dequant", "w3_dequant": "moe/w3_dequant", "softmax": "moe/router", "sigmoid": "moe/router",
    "matmul(router)": "moe/router", "matmul_(router)": "moe/router", "router_dequant": "moe/router_dequant", "topk": "moe/topk",
    "top_k": "moe/topk", "gelu": "moe/act", "elementwise_mult": "moe/act",
}  # fmt: skip
_LAYERS = {"input_norm": "norm", "post_attention_norm": "norm", "rms_norm": "norm", "RMS_norm": "norm"}


def lengths() -> dict[str, Any]:
    """Queries of each data set, and how many have how many tokens: of two of them the study prints no more than the median."""
    found = {}
    for name in reference.DATASETS:
        printed = reference.raw()["table2_datasets"][name]
        known = {"median_tokens": printed["median_seq_len"]}
        if name in ("commonsense_15k", "math_14k"):
            known = {"lengths": reference.length_histogram(name)}
        found[name] = {"queries": printed["queries"]} | known
    return found


def batches() -> dict[str, Any]:
    """Equation 1 as the artifact has it (as printed where it has none), and the largest batch of every curve."""
    figure, found = reference.max_batch_figure(), {}
    for model in reference.MODELS:
        c0, c1 = figure.artifact.get(model) or figure.printed[model]
        ran = [
            {
                "gpu": GPU_NAMES[curve.gpu], "experts_per_token": k, "queries": max(batch for batch, _ in curve.kind(kind)),
                "row_tokens": min(of_study(curve.dataset or FIGURE_15_DATASET).longest, STUDY_CUTOFF),
            }
            for curve in reference.curves() if curve.model == model
            for kind, k in reference.EXPERTS_PER_TOKEN.items()
        ]  # fmt: skip
        found[model] = {"c0": c0, "c1": c1, "model_gb": figure.model_gb[model], "ran": ran}
    return found


def step_bars() -> list[dict[str, Any]]:
    """Figures 4, 5, 6, 9 and 10 by our names: seconds of a step, and of one MoE layer's kernels; each model's smallest batch first."""
    layers, kernels = reference.layer_seconds(), reference.kernel_microseconds()
    sm, dram = reference.sm_percent(), reference.dram_percent()
    found = []
    for row in reference.stage_seconds().rows:
        key = row.model, row.kind, row.batch
        found.append(
            {
                "model": row.model, "kind": row.kind, "batch": row.batch,
                "name": f"study: {REFERENCE[row.model]}\non an A40,\n{row.kind}, batch {row.batch}",
                "phases": dict(row.values),
                "layers": _renamed(layers.row(*key).values, _LAYERS),
                "kernels": {k: v * 1e-6 for k, v in _renamed(kernels.row(*key).values, _KERNELS).items()},
                "utilization": _shares(sm.row(*key).values, dram.row(*key).values, kernels.row(*key).values),
            }
        )  # fmt: skip
    return found


def _shares(sm: Mapping[str, float], dram: Mapping[str, float], microseconds: Mapping[str, float]) -> dict[str, list[float]]:
    """Shares of both peaks by our kernels' names. Where several of the study's are one of ours, each counts by its time."""
    shares = {}
    for ours in bars.KERNELS:
        weights = {name: microseconds[name.replace("_(", "(")] for name in sm if _KERNELS.get(name) == ours}
        if total := sum(weights.values()):
            shares[ours] = [sum(of[n] * w for n, w in weights.items()) / total / 100 for of in (sm, dram)]
    return shares | {bars.ALL: [of["time_weighted"] / 100 for of in (sm, dram)]}


def _renamed(values: Mapping[str, float], names: Mapping[str, str]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for name, value in values.items():
        sums[names.get(name, name)] = sums.get(names.get(name, name), 0.0) + value
    return sums


def main(estimator: Path = published.FOLDER, profiling: Path = bars.STUDY.parent) -> None:
    """Write the files. What comes later is reckoned with the lengths that came first."""
    for file, content in (
        (estimator / "lengths.json", lengths), (estimator / "batches.json", batches), (profiling / bars.STUDY.name, step_bars),
    ):  # fmt: skip
        file.write_text(_compact(content()), encoding="utf-8")
    file = estimator / "coefficients.json"
    coefficients.write(file, entries())
    file.write_text(_compact(json.loads(file.read_text(encoding="utf-8"))), encoding="utf-8")


def _compact(content: Any) -> str:
    return json.dumps(content, separators=(",", ":")) + "\n"


if __name__ == "__main__":
    main()
