"""The study's numbers as rows of our results: what stands next to ours, experiment by experiment."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from moejax.estimator.roofline import STUDY_MODELS
from moejax.profiling import bars
from moejax.study import reference
from moejax.study.cost import paper
from moejax.study.report.results import Row

BACKWARD = "backward with recomputation"
"""The study's backward pass holds its recomputation."""
DATA = {"commonsense_15k": "cs", "math_14k": "math"}
_LOAD = {"cs": "HE", "math": "GS", "problems": "GS"}  # Figure 11's HellaSwag and GSM8K, next to which our data stand
_GPUS = {"A40": "A40", "A100": "A100-80", "H100": "H100"}
_LENGTH = {"step_seconds": "latency_seconds", "compute_utilization": "sm_percent", "memory_utilization": "dram_percent"}
MOE = "moe (time-weighted)"


def beside(experiment: str, family: str, data: str | None) -> tuple[list[Row], list[Row]]:
    """(rows of the study's that mean the same as ours of this data, those of its commonsense where it did not have our data).

    `trial` says whose a value is: "study", or "derived" from the study's numbers.
    """
    rows = [r for r in _rows() if (r.experiment, r.model) == (experiment, family)]
    same = [r for r in rows if r.data in (None, data)]
    return same, [] if any(r.data for r in same) else [r for r in rows if r.data == "cs"]


@cache
def _rows() -> tuple[Row, ...]:
    parts = (_batches, _steps, _curves, _loads, _lengths, _equation_1, _costs)
    return tuple(row for part in parts for row in part())


def _row(experiment: str, model: str, metric: str, value: float, unit: str, whose: str = "study", **columns: Any) -> Row:
    return Row.of(whose, experiment, model, STUDY_MODELS[model][1], metric, value, unit, **columns)


def _batches() -> Iterator[Row]:
    for m in reference.max_batches():
        at = {"routing": m.kind, "data": DATA[m.dataset]}
        yield _row("largest_batch", m.model, "proved_batch", m.printed, "queries", **at)
        if m.swept != m.printed:
            yield _row("largest_batch", m.model, "swept_batch", m.swept, "queries", **at)


def _steps() -> Iterator[Row]:
    """Figures 4, 5, 6, 9 and 10, by our names of what is timed."""
    for r in reference.stage_seconds().rows:
        sizes = [s.batch for s in reference.stage_seconds().rows if (s.model, s.kind) == (r.model, r.kind)]
        found = bars.study(r.model, r.kind)[sizes.index(r.batch)]
        at: dict[str, Any] = {"routing": r.kind, "batch": r.batch}
        for experiment, parts in (("stages", found.phases), ("layers", found.layers), ("kernels", found.kernels)):
            for scope, seconds in parts.items():
                yield _row(experiment, r.model, "seconds", seconds, "s", scope=BACKWARD if scope == "backward" else scope, **at)
        for scope, shares in found.utilization.items():
            for metric, share in zip(("compute_utilization", "memory_utilization"), shares, strict=True):
                if share is not None:
                    yield _row("utilization", r.model, metric, share, "share", scope=MOE if scope == bars.ALL else scope, **at)


def _curves() -> Iterator[Row]:
    """Figures 8 and 14: the A40's throughput, and equation 2 fitted to it again."""
    for curve in reference.curves():
        if curve.gpu != "a40":
            continue
        data = DATA[curve.dataset or ""]
        for kind, batch, rate in curve.points:
            point: dict[str, Any] = {"routing": kind, "data": data, "batching": "pad_longest", "batch": batch}
            yield _row("throughput", curve.model, "queries_per_second", rate, "queries/s", **point)
        for form in ("printed", "fitted"):
            fit = paper.fit_curve(curve, form)  # type: ignore[arg-type]
            at: dict[str, Any] = {"data": data, "scope": f"equation 2 ({form})"}
            yield _row("fit_throughput", curve.model, "c3", fit.c3, "1", **at)
            for name, value in (("c2", fit.c2), ("c4", fit.c4), ("rmse", paper.rmse(curve, fit))):
                yield _row("fit_throughput", curve.model, name, value, "queries/s", "derived", **at)
        yield _row("fit_throughput", curve.model, "printed_rmse", curve.printed_rmse, "queries/s", **at)


def _loads() -> Iterator[Row]:
    counts, variances = reference.tokens_per_expert(), reference.printed_variance()
    for model in reference.MODELS:
        for data, name in _LOAD.items():
            for when, suffix in (("before", ""), ("after", "_tuned")):
                key, at = (model, name + suffix), {"routing": "sparse", "data": data}
                for expert, tokens in enumerate(counts[key]):
                    yield _row("expert_load", model, "tokens_per_query", tokens, "tokens/query", scope=f"{when}/{expert}", **at)
                yield _row("expert_load", model, "variance", variances[key], "(tokens/query)^2", scope=when, **at)
                largest = max(counts[key]) / sum(counts[key])
                yield _row("expert_load", model, "largest_share", largest, "share", "derived", scope=when, **at)


def _lengths() -> Iterator[Row]:
    for metric, quantity in _LENGTH.items():
        for row in reference.sequence_length_sensitivity(quantity).rows:  # type: ignore[arg-type]
            for tokens, value in row.values.items():
                of = (value, "s", "study") if metric == "step_seconds" else (value / 100, "share", "derived")
                scope = "" if metric == "step_seconds" else MOE
                yield _row("length", row.model, metric, *of, routing=row.kind, seq_len=int(tokens), scope=scope)


def _equation_1() -> Iterator[Row]:
    """Figure 13: the printed coefficients, those that the figure was drawn with, and Mixtral's batches on commonsense."""
    figure = reference.max_batch_figure()
    for model in reference.MODELS:
        for scope, pairs in (("", figure.printed), ("as Figure 13 was drawn", figure.artifact)):
            for metric, unit, value in zip(("c0", "c1"), ("tokens/GB", "share"), pairs.get(model, ()), strict=False):
                yield _row("fit_batch", model, metric, value, unit, scope=scope)
        yield _row("fit_batch", model, "model_gb", figure.model_gb[model], "GB")
    for metric, batches in (("proved_batch", figure.ground_truth), ("predicted_batch", figure.printed_projection)):
        for gb, batch in batches.items():
            yield _row("fit_batch", "mixtral", metric, batch, "queries", scope=f"{gb} GB", routing="sparse", data="cs")


def _costs() -> Iterator[Row]:
    for r in reference.cost_table():
        at = {"routing": "sparse", "scope": _GPUS[r.gpu]}
        for metric, value, unit in (
            ("batch", r.max_batch, "queries"), ("queries_per_second", r.queries_per_second, "queries/s"), ("usd", r.usd, "USD"),
            ("usd_per_hour", r.usd_per_hour, "USD/h"),
        ):  # fmt: skip
            yield _row("cost", reference.COSTED, metric, value, unit, **at)
        yield _row("cost", reference.COSTED, "hours", r.usd / r.usd_per_hour, "h", "derived", **at)
