"""Throughput, hours and dollars of a run on a GPU, and which GPU to take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from models.config import PRESETS
from moejax import reference
from moejax.errors import UserError
from moejax.estimator import paper, roofline
from moejax.estimator.coefficients import Entry, choose
from moejax.estimator.gpus import GPU, find
from moejax.estimator.lengths import STUDY_CUTOFF, Batching, Lengths, of_study
from moejax.estimator.prices import Price, cheapest
from moejax.estimator.roofline import Method

LEVEL = 0.95
Interval = tuple[float, float] | None


@dataclass(frozen=True)
class Job:
    """What is to be trained. `model`: "mixtral" or "blackmamba"; `queries` of `lengths`, `epochs` times."""

    model: str
    method: Method
    experts_per_token: int
    lengths: Lengths
    queries: int
    epochs: float
    batching: Batching = "pad_longest"
    row_tokens: int | None = None

    def __post_init__(self) -> None:
        experts = PRESETS[roofline.STUDY_MODELS[self.model][0]].num_experts
        if not 1 <= self.experts_per_token <= experts:
            raise UserError(f"experts per token = {self.experts_per_token}: expected 1 to {experts} (all of them: the dense model)")
        for name, value in (("records", self.queries), ("epochs", self.epochs)):
            if not value > 0:
                raise UserError(f"{name} = {value:g}: expected more than 0")

    @property
    def share(self) -> float:
        return self.experts_per_token / PRESETS[roofline.STUDY_MODELS[self.model][0]].num_experts

    @property
    def work(self) -> roofline.Work:
        return roofline.work(PRESETS[roofline.STUDY_MODELS[self.model][0]], self.method)

    def tokens(self, batch: int) -> float:
        """Tokens that a step of so many queries computes."""
        return self.lengths.batch_tokens(batch, self.batching, row_tokens=self.row_tokens)

    @property
    def longest(self) -> int:
        """Tokens of the longest row that must fit in memory."""
        return self.row_tokens or min(self.lengths.longest, STUDY_CUTOFF)


@dataclass(frozen=True)
class Prediction:
    """A run on one GPU. Intervals hold one measured run with 95 %; None: nothing is known about the error, or there is no price."""

    gpu: str
    batch: int
    fits: int
    tokens_per_step: float
    step_seconds: float
    queries_per_second: float
    queries_per_second_interval: Interval
    hours: float
    hours_interval: Interval
    usd: float | None
    usd_interval: Interval
    price: Price | None
    measured: bool
    basis: str
    notes: tuple[str, ...]


def _swept(job: Job, gpu: GPU) -> int:
    """The largest batch that the study ran of this model and k, with rows as long, on a GPU of no more memory; 0 without any."""
    from moejax.estimator.curves import FIGURE_15_DATASET, GPU_NAMES

    kinds = {k: kind for kind, k in reference.EXPERTS_PER_TOKEN.items()}
    kind = kinds.get(job.experts_per_token)
    if kind is None or job.method != roofline.STUDY_MODELS[job.model][1]:
        return 0
    return max(
        (
            batch
            for curve in reference.curves()
            if curve.model == job.model and find(GPU_NAMES[curve.gpu]).memory_gb <= gpu.memory_gb
            if min(of_study(curve.dataset or FIGURE_15_DATASET).longest, STUDY_CUTOFF) >= job.longest
            for batch, _ in curve.kind(kind)
        ),
        default=0,
    )


def largest_batch(job: Job, gpu: GPU, table: dict[str, GPU]) -> int:
    """Queries that fit by the study's equation 1 with the longest row's tokens, or more where the study ran more.

    Raises UserError where weights, gradients and optimizer alone exceed the GPU, or not one query fits: by how much, and where it
    would.
    """
    figure = reference.max_batch_figure()
    c0, c1 = figure.artifact.get(job.model) or figure.printed[job.model]
    preset, method = roofline.STUDY_MODELS[job.model]
    adapters = roofline.adapter_weights(PRESETS[preset]) if job.method != "full" else 0.0
    resident = job.work.resident_gb(job.method, adapters)
    # Equation 1 was fitted with the model's own bytes, whatever training adds to them; for another method they are counted.
    model_gb = figure.model_gb[job.model] if job.method == method else resident
    needed = max(resident, model_gb + job.longest * ((1 - c1) + c1 * job.share) / c0)
    if needed > gpu.memory_gb:
        larger = [g for g in sorted(table.values(), key=lambda g: (g.memory_gb, g.name)) if g.memory_gb >= needed]
        would = f"{', '.join(g.name for g in larger)} would do" if larger else "no GPU of the table would do"
        what = (
            f"{job.model} by {job.method} holds {resident:.1f} GB before any activation, and with one query {needed:.1f} GB by equation 1"
            if resident > gpu.memory_gb
            else f"{job.model} by {job.method} with one query of {job.longest} tokens needs {needed:.1f} GB by equation 1"
        )
        raise UserError(f"{what}: {needed - gpu.memory_gb:.1f} GB more than the {gpu.name}'s {gpu.memory_gb:g} GB; {would}")
    return max(paper.max_batch(gpu.memory_gb, model_gb, job.longest, job.share, c0, c1), _swept(job, gpu))


@dataclass(frozen=True)
class Room:
    """Who says how many queries fit. `largest` raises UserError where not one does."""

    largest: Callable[[Job, GPU, dict[str, GPU]], int]
    by: str
    also: str = ""


EQUATION_1 = Room(largest_batch, "equation 1", " or that the study ran in as much memory")


def closed_form_room() -> Room:
    """By the closed form of this project's own step (`closed_form.py`), in what jax may use of the GPU by default."""
    return Room(_closed_form_batch, "the closed form of this project's step")


def _closed_form_batch(job: Job, gpu: GPU, table: dict[str, GPU]) -> int:
    """Rows of the longest query's length that fit; packed, they hold queries of the mean length."""
    from moejax.config import DeviceConfig, Experiment
    from moejax.estimator import closed_form, memory

    preset = roofline.STUDY_MODELS[job.model][0]
    config, row, fraction = PRESETS[preset].replace(experts_per_token=job.experts_per_token), job.longest, DeviceConfig().memory_fraction
    if row > config.max_position_embeddings:
        raise UserError(f"rows of {row} tokens exceed {preset}'s max_position_embeddings = {config.max_position_embeddings}")
    experiment = Experiment.model_validate(
        {
            "name": job.model, "model": {"preset": preset}, "data": {"batching": "fixed", "row_tokens": row},
            "quantization": {"format": "nf4" if job.method == "qlora" else "none"}, "adapter": None if job.method == "full" else {},
            "training": {"steps": 1, "param_dtype": "bfloat16"},  # full fine-tuning as the study's: weights and moments in bf16
        }
    )  # fmt: skip

    def peak(rows: int) -> int:
        platform, device = closed_form.platform_of(gpu), closed_form.device_of(gpu)
        return closed_form.breakdown(experiment, config, rows=rows, row_tokens=row, platform=platform, device=device).total

    found = memory.largest_rows(peak, memory.usable_bytes(gpu, fraction))
    if not found.rows:
        what = f"{job.model} by {job.method} with one row of {row} tokens, by the closed form,"
        raise UserError(memory.too_large(what, found.next_peak, gpu, fraction, table))
    return max(1, int(found.rows * row / job.lengths.mean)) if job.batching == "pack" else found.rows


def predict(
    job: Job,
    gpu: GPU,
    entries: Sequence[Entry],
    table: dict[str, GPU],
    *,
    batch: int | None = None,
    price: Price | None = None,
    room: Room = EQUATION_1,
) -> Prediction:
    """Throughput, hours and dollars. `batch` None: the one of highest throughput of those that fit."""
    step = choose(entries, job.model, job.method, gpu, table)
    step.entry.check_share(job.share)
    fits = room.largest(job, gpu, table)
    notes = []
    if batch is None:
        batch = max(range(1, min(fits, job.lengths.queries) + 1), key=lambda b: b / step.seconds(job.tokens(b), job.share))
        notes.append(f"batch {batch}: the fastest of up to {fits} that fit by {room.by}{room.also}")
    elif batch < 1:
        raise UserError(f"batch = {batch}: expected at least 1")
    elif batch > fits:
        notes.append(f"batch {batch} is more than {room.by} has room for{room.also}: {fits} queries, the longest of {job.longest} tokens")
    tokens = job.tokens(batch)
    least = job.work.least_seconds(gpu, tokens, job.share, job.method)
    seconds = step.seconds(tokens, job.share)
    if seconds < least:
        notes.append(f"the coefficients give {seconds:.3g} s a step, less than the GPU's peaks allow: {least:.3g} s is taken")
    seconds = max(seconds, least)
    ends = step.interval(tokens, job.share, LEVEL)
    interval = None if ends is None else (max(ends[0], least), max(ends[1], least))
    if interval is None:
        notes.append("no interval: the coefficients come without samples")
    total_hours = job.queries * job.epochs / batch / 3600
    hours = None if interval is None else (total_hours * interval[0], total_hours * interval[1])
    rate = None if price is None else price.usd_per_hour
    return Prediction(
        gpu=gpu.name,
        batch=batch,
        fits=fits,
        tokens_per_step=tokens,
        step_seconds=seconds,
        queries_per_second=batch / seconds,
        queries_per_second_interval=None if interval is None else (batch / interval[1], batch / interval[0]),
        hours=total_hours * seconds,
        hours_interval=hours,
        usd=None if rate is None else total_hours * seconds * rate,
        usd_interval=None if rate is None or hours is None else (hours[0] * rate, hours[1] * rate),
        price=price,
        measured=step.measured,
        basis=step.basis,
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class Plan:
    """All options by dollars, the GPUs left out and why, and the three answers (None: no option does)."""

    options: tuple[Prediction, ...]
    left_out: dict[str, str]
    cheapest: Prediction | None
    fastest_under_budget: Prediction | None
    cheapest_by_deadline: Prediction | None


def plan(
    job: Job,
    gpus: Sequence[GPU],
    entries: Sequence[Entry],
    prices: Sequence[Price],
    table: dict[str, GPU],
    *,
    budget_usd: float | None = None,
    deadline_hours: float | None = None,
    spot: bool = False,
    room: Room = EQUATION_1,
) -> Plan:
    """Every GPU at its fastest batch and lowest price. Raises UserError for a budget or deadline that is not positive."""
    for name, value in (("budget", budget_usd), ("deadline", deadline_hours)):
        if value is not None and not value > 0:
            raise UserError(f"{name} = {value:g}: expected more than 0")
    options, left_out = [], {}
    for gpu in gpus:
        price = cheapest(prices, gpu.name, spot=spot)
        if price is None:
            left_out[gpu.name] = "no spot price" if spot else "no price"
            continue
        try:
            options.append(predict(job, gpu, entries, table, price=price, room=room))
        except UserError as error:
            left_out[gpu.name] = str(error)
    if not options:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        raise UserError(f"no GPU can be planned with. {reasons}")

    def dollars(p: Prediction) -> float:
        return p.usd if p.usd is not None else float("inf")

    options.sort(key=dollars)
    affordable = [p for p in options if budget_usd is None or dollars(p) <= budget_usd]
    timely = [p for p in options if deadline_hours is None or p.hours <= deadline_hours]
    return Plan(
        tuple(options),
        left_out,
        options[0],
        min(affordable, key=lambda p: p.hours, default=None),
        min(timely, key=dollars, default=None),
    )
