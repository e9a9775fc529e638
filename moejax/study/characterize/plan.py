"""Which trials a study has, in which order, and about how long each takes.

A trial's name says what it measures: EXPERIMENT/MODEL/DATA/ROUTING/…; its child process finds its setting by it. The expected seconds are
rough: starting, compiling and the step's FLOPs and bytes at a share of the device's peaks. As trials finish, what is left is scaled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moejax import gpus
from moejax.estimator import closed_form, sizes
from moejax.study.characterize.presets import Batch, Sizes, queries_of
from moejax.study.characterize.study import Setting, Study
from moejax.study.report.results import Environment
from moejax.training import flops

Kind = Literal["predict", "prove", "throughput", "breakdown", "length", "expert_load", "fit", "cost"]
EXPERIMENT: dict[Kind, str] = {
    "predict": "largest_batch", "prove": "largest_batch", "throughput": "throughput", "breakdown": "stages", "length": "length",
    "expert_load": "expert_load", "fit": "fit_throughput", "cost": "cost",
}  # fmt: skip
# (seconds to start a process, seconds to compile a step, share of the matrix peak, share of the bandwidth): a CPU by cpu-demo on two cores,
# a GPU's compiling by benchmarks/results/2026-11-30-gpu-program.json; the shares on a GPU are a guess on the careful side.
_PACE = {"cpu": (5.0, 5.0, 0.25, 0.1), "gpu": (12.0, 10.0, 0.25, 0.5)}
_FILL_BYTES_PER_SECOND = 2e9  # random weights, or a file's


@dataclass(frozen=True)
class Task:
    """A trial: what is run of which setting. batch: of throughput; row_tokens: of a row, where the trial fixes it."""

    name: str
    kind: Kind
    setting: Setting
    batching: Literal["pad_longest", "pack", "fixed"] | None = None
    batch: Batch | None = None
    row_tokens: int | None = None

    @property
    def needs_largest(self) -> bool:
        """Whether it waits for the largest batch of its setting."""
        return self.kind in ("throughput", "breakdown", "length", "expert_load")


def packed_row(sizes: Sizes, s: Setting) -> int:
    """Tokens of a packed row: a preset's, but never less than the longest query of the data."""
    return max(sizes.pack_row_tokens or 0, s.longest)


def tasks(study: Study) -> list[Task]:
    """All trials, in the order in which they run: what others wait for first."""
    sizes_, found = study.sizes, []
    for s in study.settings:
        found.append(Task(f"largest_batch/{s.key}/predict", "predict", s, "fixed", None, s.longest))
        found.append(Task(f"largest_batch/{s.key}/prove", "prove", s, "fixed", None, s.longest))
    for s in study.first_data():
        at = sizes_.breakdown_tokens
        found.append(Task(f"stages/{s.key}/1", "breakdown", s, "fixed", 1, at))
        lengths = sizes_.lengths if s.routing == "sparse" else sizes_.dense_lengths
        for length in lengths if at in lengths else sorted((at, *lengths)):
            found.append(Task(f"length/{s.key}/{length}", "length", s, "fixed", "largest", length))
    for s in study.settings:
        found += [Task(f"throughput/{s.key}/padded/{_name(b)}", "throughput", s, "pad_longest", b, s.longest) for b in sizes_.batches]
        found += [Task(f"throughput/{s.key}/packed/{_name(b)}", "throughput", s, "pack", b, packed_row(sizes_, s)) for b in sizes_.packed]
    for s in study.settings:
        if s.routing == "sparse":
            found.append(Task(f"expert_load/{s.key}", "expert_load", s, "pack", None, packed_row(sizes_, s)))
    for s in {s.model: s for s in study.settings}.values():
        found += [Task(f"fit/{s.model}", "fit", s), Task(f"cost/{s.model}", "cost", s)]
    return found


def _name(batch: Batch) -> str:
    return str(batch).replace("/", "of")


def rows_of(task: Task, largest: int, study: Study) -> int:
    """Rows of a step of this trial, where `largest` rows of the setting's longest query fit. Not yet checked against the memory."""
    assert task.row_tokens is not None
    queries = queries_of(task.batch or "largest", largest)
    if task.batching == "pad_longest" or task.batch == 1:
        return queries
    rows = max(1, queries * task.setting.longest // task.row_tokens)
    return min(rows, 8) if task.kind == "expert_load" else rows


def platform_of(environment: Environment) -> gpus.Platform:
    """Which of the closed form's kinds of programs the device gets; of a GPU that is in no table, Hopper's."""
    known = gpus.of_device_kind(environment.device)
    return "cpu" if environment.platform == "cpu" else closed_form.platform_of(known) if known else "sm9"


def expected(task: Task, study: Study, environment: Environment, limit: float) -> float:
    """Seconds that a trial is expected to take, all its processes together."""
    if task.kind in ("fit", "cost"):
        return 2.0
    s, sizes_ = task.setting, study.sizes
    start, compile_, of_peak, of_bandwidth = _PACE[environment.platform]
    weights = sum(w.bytes for w in sizes.stored(s.experiment, s.architecture))
    largest = max(1, s.closed_form_rows(s.longest, limit, platform_of(environment)))
    rows = rows_of(task, largest, study)
    assert task.row_tokens is not None
    counted = flops.count(s.architecture, s.experiment.adapter.lora if s.experiment.adapter else None)
    again = 4 / 3 if s.method == "full" else 3 / 2  # the forward pass is computed twice
    needed = again * counted.step(rows * task.row_tokens, [task.row_tokens] * rows)
    step = needed / (of_peak * (environment.peak_flops or 1e12)) + weights / (of_bandwidth * (environment.peak_bytes_per_second or 1e11))
    batches = max(1, sizes_.queries // queries_of(task.batch or "largest", largest))
    shapes = 1 if task.batching == "pack" else max(1, min(batches, s.longest // 16))
    traced = 3 + sizes_.timed + 2 * sizes_.traced
    processes, compiles, steps = {
        "predict": (1, 2.5, 0.0), "prove": (2, 1.0, 3.0), "breakdown": (1, 1.5, traced), "length": (1, 1.5, traced),
        "expert_load": (1, 2.0, sizes_.tune_steps + 2 * max(1, sizes_.load_queries // 4) / 3 / rows),
        # A padded batch is as long as its longest query, a packed one holds several: on the whole half of the longest row.
        "throughput": (1, shapes, (batches + shapes) * (0.5 if s.longest > 64 else 1.0)),
    }[task.kind]  # fmt: skip
    return processes * start + compiles * compile_ + (weights / _FILL_BYTES_PER_SECOND if steps else 0.0) + steps * step
