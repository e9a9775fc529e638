"""What each kind of trial measures: rows of the results, and facts that other trials compute with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from moejax.data.batch import Batch, segment_lengths
from moejax.data.batching import Batches, stack
from moejax.device import usable_bytes
from moejax.estimator import closed_form, memory
from moejax.profiling import roofline
from moejax.study.characterize.measure import Session, random_rows
from moejax.study.characterize.plan import Task, platform_of
from moejax.study.characterize.result import Result
from moejax.study.characterize.study import Study
from moejax.study.report.results import Environment, Row

WARM = 2


@dataclass(frozen=True)
class Trial:
    """A task in its own process. limit: artificial, or None: the device's own."""

    task: Task
    study: Study
    environment: Environment
    limit: int | None

    def row(self, metric: str, value: float, unit: str, *, experiment: str, scope: str = "", batch: float | None = None) -> Row:
        """A row of this trial's setting."""
        s, t = self.task.setting, self.task
        plain = value if isinstance(value, int) else float(value)
        data = "fixed" if t.batching == "fixed" and t.kind in ("breakdown", "length") else s.data
        return Row(t.name, experiment, s.model, s.method, s.routing, data, t.batching, t.row_tokens, batch, scope, metric, plain, unit)


def predict(t: Trial) -> Result:
    """The largest batch of the longest queries by the compiler: two neighbours, one within the limit and one not."""
    s = t.task.setting
    session = Session(s, None)  # nothing is refused: only the figures are wanted
    limit = t.limit or usable_bytes()
    assert limit is not None  # the parent asks for --memory-limit where the device does not say
    platform = platform_of(t.environment)

    def closed(rows: int) -> int:
        return closed_form.breakdown(s.experiment, s.architecture, rows=rows, row_tokens=s.longest, platform=platform).total

    guess = max(1, memory.largest_rows(closed, limit).rows)
    # The program's arrays and the closed form differ by a few percent: the first compiled peak corrects the guess.
    ratio = session.compile(guess, s.longest).peak_bytes / closed(guess)
    guess = max(1, memory.largest_rows(lambda rows: int(ratio * closed(rows)), limit).rows)
    found = memory.largest_rows(lambda rows: session.compile(rows, s.longest).peak_bytes, limit, guess, closed(guess + 1) - closed(guess))
    facts = {"rows": found.rows, "tried": {str(r): b for r, b in found.tried.items()}}
    out = Result("done" if found.rows else "out_of_memory", facts=facts)
    out.rows = [
        t.row("predicted_batch", found.rows, "queries", experiment="largest_batch", batch=found.rows),
        t.row("memory_limit", int(limit), "bytes", scope="device" if t.limit is None else "artificial", experiment="largest_batch"),
    ]
    if not found.rows:
        out.message = (
            f"not one query of {s.longest} tokens fits into {limit / 1e6:,.1f} MB: the step takes {found.next_peak / 1e6:,.1f} MB "
            "(`moejax estimate memory` says on which GPU it would, and with what it might here)"
        )
    return out


def attempt(t: Trial, rows: int) -> Result:
    """Run two steps of `rows` of the longest queries. Raises OutOfMemory, or what the device raises."""
    s = t.task.setting
    session = Session(s, t.limit)
    compiled = session.compile(rows, s.longest)
    session.load()
    seconds = [session.step(random_rows(s, rows, s.longest)) for _ in range(2)]
    return Result(facts={"peak_bytes": compiled.peak_bytes, "argument_bytes": compiled.argument_bytes, "step_seconds": seconds[-1]})


def _fitting_session(t: Trial, traced: bool = False) -> Session:
    """For `compile_fitting`: the device's own limit counts too."""
    return Session(t.task.setting, t.limit or usable_bytes(), artificial=t.limit is not None, traced=traced)


def throughput(t: Trial, rows: int) -> Result:
    """Train on this many queries of the data, every program compiled and run once before the clock starts."""
    s = t.task.setting
    session = Session(s, t.limit)
    if t.task.batching == "pack":
        assert t.task.row_tokens is not None
        session = _fitting_session(t)
        rows, _ = session.compile_fitting(rows, t.task.row_tokens)
    batches = list(_full_batches(t, rows, t.study.sizes.queries))
    firsts = {b.tokens.shape: b for b in batches}
    compiled = {shape: session.compile(shape[1], shape[2]) for shape in firsts}
    session.load()
    for first in firsts.values():
        session.step(first)
    seconds = [session.step(b) for b in batches]
    counts = [segment_lengths(b.segment_ids) for b in batches]
    queries, real = sum(map(len, counts)), sum(map(sum, counts))
    computed, total = sum(b.tokens.size for b in batches), sum(seconds)
    peak = max(compiled.values(), key=lambda c: c.peak_bytes)
    batch = queries / len(batches)
    values = [
        ("queries_per_second", queries / total, "queries/s"), ("tokens_per_second", real / total, "tokens/s"),
        ("step_seconds", median(seconds), "s"), ("seconds", total, "s"), ("queries", queries, "queries"), ("steps", len(batches), "steps"),
        ("padded_share", 1 - real / computed, "share"), ("compiler_peak_bytes", peak.peak_bytes, "bytes"),
    ]  # fmt: skip
    facts = {
        "queries": batch, "tokens": computed / len(batches), "seconds": total / len(batches), "peak_bytes": peak.peak_bytes,
        "argument_bytes": peak.argument_bytes, "peak_tokens": peak_tokens(compiled), "shapes": len(firsts), "routing": s.routing,
    }  # fmt: skip
    size = int(batch) if batch.is_integer() else batch
    return Result(rows=[t.row(*v, experiment="throughput", batch=size) for v in values], facts=facts)


def peak_tokens(compiled: dict[tuple[int, ...], Any]) -> int:
    """Tokens of the program that takes most."""
    _, rows, tokens = max(compiled, key=lambda shape: compiled[shape].peak_bytes)
    return rows * tokens


def _full_batches(t: Trial, rows: int, wanted: int) -> Iterator[Batch]:
    """Whole batches [1, rows, T] until `wanted` queries are in, or the data's end; at least one batch, whole or not."""
    s = t.task.setting
    queries = s.queries(wanted + 16 * rows)  # of random ones: more than can be needed
    data = s.experiment.data.model_copy(
        update={"batching": t.task.batching, "row_tokens": t.task.row_tokens, "batch_rows": rows, "max_length": s.longest}
    )
    taken = 0
    for batch in Batches(queries, data, s.experiment.seed).iterate(0):
        full = bool((batch.segment_ids.max(axis=1) > 0).all())
        if taken >= wanted or (taken and not full):
            return
        taken += len(segment_lengths(batch.segment_ids))
        yield stack([batch], 1)


def breakdown(t: Trial, rows: int) -> Result:
    """Where the time of a step of fixed rows goes, and what it reaches of the device's peaks; at another length than the breakdown's only
    the latter, which is the length study."""
    s, sizes, length = t.task.setting, t.study.sizes, t.task.row_tokens
    assert length is not None
    session = _fitting_session(t, traced=True)
    rows, compiled = session.compile_fitting(rows, length)
    session.load()
    batches = [random_rows(s, rows, length, seed) for seed in range(WARM + sizes.timed + sizes.traced)]
    seconds = [session.step(b) for b in batches[: WARM + sizes.timed]][WARM:]
    b = session.trace(batches[WARM + sizes.timed :])
    e = t.environment
    stages = roofline.stages(b, roofline.believed(b, roofline.Peaks(e.peak_flops, e.peak_bytes_per_second, e.peaks)))
    moe = [stage for stage in stages if stage.name.split("/")[0] == "moe"]
    whole = [roofline.time_weighted(moe, "moe (time-weighted)"), roofline.time_weighted(stages, "step (time-weighted)")]
    out = Result(facts={
        "queries": rows, "tokens": rows * length, "seconds": median(seconds), "peak_bytes": compiled.peak_bytes,
        "argument_bytes": compiled.argument_bytes, "routing": s.routing,
    })  # fmt: skip

    def add(experiment: str, metric: str, value: float | None, unit: str, scope: str = "") -> None:
        if value is not None:
            out.rows.append(t.row(metric, value, unit, scope=scope, experiment=experiment, batch=rows))

    # Where the largest batch is 1, the breakdown of batch 1 is another trial's.
    if length == sizes.breakdown_tokens and not (t.task.kind == "length" and rows == 1):
        for experiment, parts in (("stages", b.phases), ("layers", b.layers), ("kernels", b.moe_kernels)):
            for scope, value in parts.items():
                add(experiment, "seconds", value, "s", scope)
        for stage in [*moe, *whole]:
            add("utilization", "compute_utilization", stage.flops_share, "share", stage.name)
            add("utilization", "memory_utilization", stage.bandwidth_share, "share", stage.name)
            add("utilization", "seconds", stage.seconds, "s", stage.name)
    if t.task.kind == "length":
        step, total = median(seconds), sum(seconds)
        for metric, value, unit in (
            ("queries_per_second", rows / step, "queries/s"), ("tokens_per_second", rows * length / step, "tokens/s"),
            ("step_seconds", step, "s"), ("seconds", total, "s"), ("steps", len(seconds), "steps"),
            ("compiler_peak_bytes", compiled.peak_bytes, "bytes"),
        ):  # fmt: skip
            add("length", metric, value, unit)
        for stage in whole:
            add("length", "compute_utilization", stage.flops_share, "share", stage.name)
            add("length", "memory_utilization", stage.bandwidth_share, "share", stage.name)
    return out


def expert_load(t: Trial, rows: int) -> Result:
    """Tokens per expert, before and after `tune_steps` steps of training on the same data."""
    from moejax.evaluation.expert_load import count, summarize

    s, sizes = t.task.setting, t.study.sizes
    session = _fitting_session(t)
    assert t.task.row_tokens is not None
    rows, _ = session.compile_fitting(rows, t.task.row_tokens)
    session.load()
    data = s.experiment.data.model_copy(
        update={"batching": "pack", "row_tokens": t.task.row_tokens, "batch_rows": rows, "max_length": s.longest}
    )
    queries = s.queries(max(sizes.load_queries, 16 * rows))
    watched = Batches(queries[: sizes.load_queries], data, s.experiment.seed, shuffle=False)
    counts: dict[str, np.ndarray] = {"before": count(session.program.model(), watched)}
    trained = Batches(queries[sizes.load_queries :] or queries, data, s.experiment.seed)
    done, epoch = 0, 0
    while done < sizes.tune_steps:
        for batch in trained.iterate(epoch):
            if done == sizes.tune_steps:
                break
            session.step(stack([batch], 1))
            done += 1
        epoch += 1
    counts["after"] = count(session.program.model(), watched)
    found = summarize(counts, watched, s.data, s.architecture)["models"]
    out = Result(message=f"{done} steps of {rows} rows between; {len(watched.queries)} queries counted")
    for when, load in found.items():
        mean = np.array(load["tokens_per_query"])
        share = mean / mean.sum()
        for expert, (tokens, part) in enumerate(zip(mean.tolist(), share.tolist(), strict=True)):
            out.rows.append(t.row("tokens_per_query", tokens, "tokens/query", scope=f"{when}/{expert}", experiment="expert_load"))
            out.rows.append(t.row("share", part, "share", scope=f"{when}/{expert}", experiment="expert_load"))
        out.rows.append(t.row("variance", load["variance"], "(tokens/query)^2", scope=when, experiment="expert_load"))
        out.rows.append(t.row("largest_share", float(share.max()), "share", scope=when, experiment="expert_load"))
    return out
