"""Typed access to paper_2408_04693.json: the study's printed text and tables, and the data its figures were drawn from.

Every group of numbers keeps its origin: "printed" is what the paper's text and tables say, "figure data" what its published artifact
holds. Where the two disagree both are here, and `moejax.study.cost.reproduce` says so. Models are "mixtral" (Mixtral-8x7B, QLoRA)
and "blackmamba" (BlackMamba-2.8B, all weights); kinds are "dense" (8 of 8 experts) and "sparse" (2 of 8).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

REFERENCE = {"mixtral": "Mixtral-8x7B", "blackmamba": "BlackMamba-2.8B"}
"""Family -> the study's model, in PyTorch: named wherever a number of it stands alongside a model of ours, which may be a tiny one."""
MODELS = tuple(REFERENCE)
DATASETS = ("commonsense_15k", "math_14k", "hellaswag", "gsm8k")
EXPERTS = 8
EXPERTS_PER_TOKEN = {"dense": 8, "sparse": 2}


@dataclass(frozen=True)
class Row:
    """Values of one setting. `batch` in queries; None where a figure is not by batch."""

    model: str
    kind: str
    batch: int | None
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """A figure's numbers (figure data), in one unit."""

    name: str
    rows: tuple[Row, ...]

    def row(self, model: str, kind: str, batch: int | None = None) -> Row:
        """The row of this setting. Raises KeyError where the study has none."""
        for row in self.rows:
            if (row.model, row.kind, row.batch) == (model, kind, batch):
                return row
        raise KeyError(f"{self.name} has no row {model}, {kind}, batch {batch}")


@dataclass(frozen=True)
class Curve:
    """Throughput over batch size of one model on one GPU (Figures 14 and 15; origin "figure data").

    `points`: (kind, batch in queries, queries per second). `dataset` is None for the three curves of Figure 15, whose data set the
    sources contradict each other about. `c3` is the constant that the artifact fixed in its fit.
    """

    name: str
    gpu: str
    model: str
    dataset: str | None
    c3: float
    printed_rmse: float
    points: tuple[tuple[str, int, float], ...]

    def kind(self, kind: str) -> tuple[tuple[int, float], ...]:
        """(batch, queries per second) of "dense" or "sparse", by batch."""
        return tuple((batch, rate) for which, batch, rate in self.points if which == kind)


@dataclass(frozen=True)
class MaxBatch:
    """Table III: the largest batch on an A40 of 48 GB. `swept`: the largest that the artifact's sweeps hold."""

    model: str
    dataset: str
    kind: str
    printed: int
    swept: int


@dataclass(frozen=True)
class Equation1:
    """Figure 13: coefficients of equation 1, the batch sizes measured, and the paper's projections (keys: memory in GB)."""

    printed: Mapping[str, tuple[float, float]]
    artifact: Mapping[str, tuple[float, float]]
    sequence_tokens: int
    model_gb: Mapping[str, float]
    ground_truth: Mapping[int, int]
    printed_projection: Mapping[int, int]


@dataclass(frozen=True)
class CostRow:
    """A row of Table IV (origin "printed")."""

    gpu: str
    memory_gb: float
    max_batch: int
    queries_per_second: float
    usd_per_hour: float
    usd: float


@cache
def raw() -> dict[str, Any]:
    """The whole file as it is."""
    return json.loads(resources.files(__package__).joinpath("paper_2408_04693.json").read_text(encoding="utf-8"))


def _by_setting(name: str, key: str) -> Table:
    """Figures 4 to 6: {"Dense(bsz=1)": [values in the order of `columns`]}."""
    group = raw()[key]
    rows = []
    for model in MODELS:
        columns = group[model].get("columns") or group["columns"]
        for setting, values in group[model].items():
            match = re.fullmatch(r"(Dense|Sparse)\(bsz=(\d+)\)", setting)
            if match:
                rows.append(Row(model, match[1].lower(), int(match[2]), dict(zip(columns, values, strict=True))))
    return Table(name, tuple(rows))


def stage_seconds() -> Table:
    """Figure 4: forward, backward, optimizer; seconds per step, A40, 128 tokens a query."""
    return _by_setting("Figure 4", "fig4_stage_seconds")


def layer_seconds() -> Table:
    """Figure 5: seconds per step by kind of layer, A40, 128 tokens a query."""
    return _by_setting("Figure 5", "fig5_layer_seconds")


def kernel_microseconds() -> Table:
    """Figure 6: microseconds of the kernels of one MoE layer (the expert matrices': of one expert), A40, 128 tokens a query."""
    return _by_setting("Figure 6", "fig6_moe_kernel_microseconds")


# Figures 9 and 10 have no batch in their column names: the artifact's five settings, by model.
_UTILIZATION_SETTINGS = {
    "mixtral": (("dense", 1), ("dense", 10), ("sparse", 1), ("sparse", 10), ("sparse", 32)),
    "blackmamba": (("dense", 1), ("dense", 30), ("sparse", 1), ("sparse", 30), ("sparse", 84)),
}


def _utilization(name: str, key: str) -> Table:
    group = raw()[key]
    rows = [
        Row(model, kind, batch, {kernel: values[column] for kernel, values in group[model].items()})
        for model, settings in _UTILIZATION_SETTINGS.items()
        for column, (kind, batch) in enumerate(settings)
    ]
    return Table(name, tuple(rows))


def sm_percent() -> Table:
    """Figure 9: utilization of the streaming multiprocessors by kernel, and weighted by time."""
    return _utilization("Figure 9", "fig9_sm_utilization_percent")


def dram_percent() -> Table:
    """Figure 10: utilization of the memory bandwidth by kernel, and weighted by time."""
    return _utilization("Figure 10", "fig10_dram_utilization_percent")


def tokens_per_expert() -> dict[tuple[str, str], tuple[float, ...]]:
    """Figure 11 (figure data): (model, "HE" | "HE_tuned" | "GS" | "GS_tuned") -> mean tokens per query of experts 0 to 7."""
    group = raw()["fig11_tokens_per_expert"]
    return {(model, data): tuple(values) for model in MODELS for data, values in group[model].items()}


def printed_variance() -> dict[tuple[str, str], float]:
    """Figure 11 (printed): (model, data) -> variance over the experts."""
    group = raw()["fig11_tokens_per_expert"]["printed_variance"]
    return {(model, data): value for model in MODELS for data, value in group[model].items()}


def accuracy_by_epoch() -> dict[tuple[str, str, str], tuple[float, ...]]:
    """Figure 3 (figure data): (model, data set, kind) -> accuracy after epochs 0 to 10."""
    group = raw()["fig3_accuracy_by_epoch"]
    return {(m, data, kind): tuple(v) for m in MODELS for data, kinds in group[m].items() for kind, v in kinds.items()}


def sequence_length_sensitivity(quantity: Literal["latency_seconds", "sm_percent", "dram_percent"]) -> Table:
    """Step seconds, SM or DRAM utilization (figure data) by tokens a query, "64" to "1024"."""
    group = raw()["seq_len_sensitivity"]
    rows = [
        Row(model, kind.lower(), None, dict(zip(group["columns"], values, strict=True)))
        for model in MODELS
        for kind, values in group[quantity][model].items()
    ]
    return Table(f"sequence length, {quantity}", tuple(rows))


def length_histogram(dataset: str) -> list[list[int]]:
    """Figure 2 (figure data): [tokens by GPT-NeoX's tokenizer, how many queries have this many] of "commonsense_15k" or "math_14k". Raises
    KeyError for another data set: the study drew none."""
    return raw()["fig2_sequence_length_histogram"][dataset]


def max_batches() -> tuple[MaxBatch, ...]:
    """Table III, next to the largest batch of the artifact's sweep in the same setting."""
    swept = {(c.model, c.dataset, kind): max(b for b, _ in c.kind(kind)) for c in curves() for kind in EXPERTS_PER_TOKEN}
    group = raw()["table3_max_batch_size_a40"]
    return tuple(
        MaxBatch(model, data, kind, batch, swept[model, data, kind])
        for model in MODELS
        for data, kinds in group[model].items()
        for kind, batch in kinds.items()
    )


def max_batch_figure() -> Equation1:
    """Figure 13: equation 1's two pairs of coefficients, what was measured, what was projected."""
    group = raw()["fig13_max_batch"]
    return Equation1(
        printed={model: tuple(pair) for model, pair in group["printed_c0_c1"].items()},
        artifact={model: tuple(pair) for model, pair in group["artifact_c0_c1"].items()},
        sequence_tokens=group["artifact_seq_len"],
        model_gb=group["model_mem_gb"],
        ground_truth={int(re.search(r"(\d+)GB", gpu)[1]): batch for gpu, batch in group["ground_truth"].items()},  # type: ignore[index]
        printed_projection={int(gb.removesuffix("GB")): batch for gb, batch in group["printed_projection"].items()},
    )


@cache
def curves() -> tuple[Curve, ...]:
    """The seven curves of Figures 14 and 15, in the paper's order."""
    rmse = raw()["fig14_fig15_printed_rmse"]
    found = []
    for name, group in raw()["fig14_fig15_throughput"].items():
        gpu, model, *dataset = name.split("/")
        points = [
            (kind, batch, rate)
            for kind in EXPERTS_PER_TOKEN
            for batch, rate in zip(group[kind]["batch_size"], group[kind]["queries_per_second"], strict=True)
        ]
        data = dataset[0] if dataset else None
        found.append(Curve(name, gpu, model, data, group["artifact_exponent_c3"], rmse[name], tuple(points)))
    return tuple(found)


COSTED = "mixtral"
"""The model of Table IV."""


def cost_table() -> tuple[CostRow, ...]:
    """Table IV."""
    rows = raw()["table4_cost"]["rows"]
    return tuple(
        CostRow(r["gpu"], r["mem_gb"], r["max_batch"], r["throughput"], r["usd_per_hour"], r["usd"]) for r in rows
    )
