"""What the study concludes, computed alike from our rows and from its own: the page's first table."""

from __future__ import annotations

from collections.abc import Sequence

from moejax.profiling import bars
from moejax.study.reference import REFERENCE
from moejax.study.report import published
from moejax.study.report.compare import Source
from moejax.study.report.grid import Grid
from moejax.study.report.naming import said
from moejax.study.report.page import Number, Table
from moejax.study.report.quantities import rounded
from moejax.study.report.results import Row


def table(sources: Sequence[Source]) -> tuple[Table, ...]:
    """A group for each model; nothing where nothing of it was measured."""
    grid = Grid(sources, "")
    for source in sources:
        for model in source.study.models:
            rows = [r for r in source.study.rows if r.model == model.name]
            data = next((r.data for r in rows if r.experiment in ("largest_batch", "throughput")), None)
            group = ", ".join(filter(None, (model.name, said("method", model.method), said("data", data) if data else "")))
            ours = computed([r for r in rows if r.data in (None, "fixed", data)])
            for line, (value, unit) in ours.items():
                grid.put(group, line, source, _derived(value, unit))
            if model.family and ours:
                theirs = [row for experiment in _EXPERIMENTS for part in published.beside(experiment, model.family, data) for row in part]
                for line, (value, unit) in computed(theirs).items():
                    if line in ours:
                        grid.cells[group][line].pop(len(sources), None)  # of another folder: the same
                        grid.put(group, line, None, _derived(value, unit), study=REFERENCE[model.family])
    caption = "The study's conclusions. Of a step: at the largest sparse batch that was profiled; of throughput: padded batches."
    return (grid.table(caption),) if grid.cells else ()


_EXPERIMENTS = ("largest_batch", "stages", "layers", "kernels", "throughput", "utilization", "expert_load", "cost")


def _derived(value: float, unit: str) -> Number:
    return Number(rounded(value, unit), repr(value), "derived")


def computed(rows: Sequence[Row]) -> dict[str, tuple[float, str]]:
    """Conclusion -> (value, unit), of rows of one model and data set; what was not measured is not there."""
    found: dict[str, tuple[float, str]] = {}

    def put(line: str, value: float | None, over: float | None = 1.0, unit: str = "") -> None:
        if value is not None and over:
            found[line] = value / over, unit

    def every(metric: str, routing: str = "sparse", **where: object) -> list[float]:
        return [
            r.value for r in rows
            if (r.metric, r.routing) == (metric, routing) and r.batching != "pack" and all(getattr(r, k) == v for k, v in where.items())
        ]  # fmt: skip

    def best(metric: str, routing: str = "sparse", **where: object) -> float | None:
        return max(every(metric, routing, **where), default=None)

    put("largest batch, sparse over dense", best("proved_batch"), best("proved_batch", "dense"))
    rate, where = "queries_per_second", {"experiment": "throughput"}
    put("queries a second at best, sparse over dense", best(rate, **where), best(rate, "dense", **where))
    put("queries a second at best over batch 1, sparse", best(rate, **where), best(rate, **where, batch=1))
    profiled = [r for r in rows if r.experiment in ("stages", "layers", "kernels") and (r.routing, r.metric) == ("sparse", "seconds")]
    largest = max((r.batch or 0 for r in profiled), default=0)
    parts: dict[str, dict[str, float]] = {"stages": {}, "layers": {}, "kernels": {}}
    for r in profiled:
        if r.batch == largest and r.scope != "idle":
            parts[r.experiment]["backward" if r.scope == published.BACKWARD else r.scope] = r.value
    shares = bars.takeaways(bars.Bars("", parts["stages"], parts["layers"], parts["kernels"]))
    for line, share in shares.items():
        put(line, share, unit="" if "/" in line else "share")
    for metric, line in (("compute_utilization", "matrix units"), ("memory_utilization", "memory")):
        busy = {batch: best(metric, experiment="utilization", scope=published.MOE, batch=batch) for batch in (1, largest)}
        if largest > 1:
            put(f"use of the {line} in the MoE, largest batch over batch 1", busy[largest], busy[1])
    load = {when: best("largest_share", experiment="expert_load", scope=when) for when in ("before", "after")}
    put("largest expert's share, after fine-tuning over before", load["after"], load["before"])
    put("dollars of the whole run at least, sparse", min(every("usd"), default=None), unit="USD")
    return found
