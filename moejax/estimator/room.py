"""How many queries fit into a GPU: by the study's equation 1 (PyTorch's memory), or by the closed form of this project's step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moejax.estimator import memory, published, roofline
from moejax.estimator.equations import max_batch
from moejax.estimator.job import Job
from moejax.estimator.lengths import STUDY_CUTOFF
from moejax.gpus import GPU, find


@dataclass(frozen=True)
class Room:
    """Who says how many queries fit. `largest` raises DoesNotFit where not one does."""

    largest: Callable[[Job, GPU, dict[str, GPU]], int]
    by: str
    also: str = ""
    rows_known: int | None = None  # tokens of the longest row that the rule was made for


def _swept(job: Job, gpu: GPU) -> int:
    """The largest batch that the study ran of this model and k, with rows as long, on a GPU of no more memory; 0 without any."""
    if job.method != roofline.STUDY_MODELS[job.model][1]:
        return 0
    return max(
        (
            ran["queries"]
            for ran in published.read("batches.json")[job.model]["ran"]
            if ran["experts_per_token"] == job.experts_per_token and ran["row_tokens"] >= job.longest
            if find(ran["gpu"]).memory_gb <= gpu.memory_gb
        ),
        default=0,
    )


def by_equation_1(job: Job, gpu: GPU, table: dict[str, GPU]) -> int:
    """Queries that fit by the study's equation 1 with the longest row's tokens, or more where the study ran more.

    Raises DoesNotFit where weights, gradients and optimizer alone exceed the GPU, or not one query fits: by how much, and where it
    would. Of several cards each holds all: this many times the queries.
    """
    fitted = published.read("batches.json")[job.model]
    c0, c1 = fitted["c0"], fitted["c1"]
    method = roofline.STUDY_MODELS[job.model][1]
    resident = job.work.resident_gb(roofline.adapter_weights(job.config))
    # Equation 1 was fitted with the model's own bytes, whatever training adds to them; for another method they are counted.
    model_gb = fitted["model_gb"] if job.method == method else resident
    needed = max(resident, model_gb + job.longest * ((1 - c1) + c1 * job.share) / c0)
    if needed > gpu.memory_gb:
        would = memory.would_do(g for g in table.values() if g.bf16 and g.memory_gb >= needed)
        what = (
            f"{job.model} by {job.method} holds {resident:.1f} GB before any activation, and with one query {needed:.1f} GB by equation 1"
            if resident > gpu.memory_gb
            else f"{job.model} by {job.method} with one query of {job.longest} tokens needs {needed:.1f} GB by equation 1"
        )
        raise memory.DoesNotFit(f"{needed - gpu.memory_gb:.1f} GB more than the {gpu.name}'s {gpu.memory_gb:g} GB", would, what)
    return job.devices * max(max_batch(gpu.memory_gb, model_gb, job.longest, job.share, c0, c1), _swept(job, gpu))


def by_closed_form(job: Job, gpu: GPU, table: dict[str, GPU]) -> int:
    """Rows of the longest query's length that fit in what jax may use of the GPU by default, by the closed form of this project's own
    step (`closed_form.py`); packed, they hold queries of the mean length."""
    from moejax.config import DeviceConfig
    from moejax.estimator import closed_form

    config, row, fraction = job.config.replace(experts_per_token=job.experts_per_token), job.longest, DeviceConfig().memory_fraction
    experiment, n = job.experiment, job.devices

    def peak(rows: int, other: GPU = gpu) -> int:
        return closed_form.on(other, experiment, config, n * rows, row).total

    sure, _ = memory.by_closed_form(memory.usable_bytes(gpu, fraction))
    found = memory.largest_rows(peak, sure)
    if not found.rows:
        what = f"{job.model} by {job.method} with one row of {row} tokens"
        others = [g for g in table.values() if g.bf16]
        raise memory.too_large(what, found.next_peak, gpu, fraction, others, lambda g: peak(1, g), closed=True)
    return max(1, int(n * found.rows * row / job.lengths.mean)) if job.batching == "pack" else n * found.rows


EQUATION_1 = Room(by_equation_1, "equation 1", " or that the study ran in as much memory", STUDY_CUTOFF)
CLOSED_FORM = Room(by_closed_form, "the closed form of this project's step, its error allowed for")
