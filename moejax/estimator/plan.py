"""Throughput, hours and dollars of a run on a GPU, and which GPU to take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moejax.errors import UserError
from moejax.estimator.coefficients import Entry, choose
from moejax.estimator.job import Job
from moejax.estimator.memory import DoesNotFit, refusals
from moejax.estimator.prices import Price, cheapest
from moejax.estimator.room import EQUATION_1, Room
from moejax.gpus import GPU

LEVEL = 0.95
Interval = tuple[float, float] | None


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


def batches(most: int) -> list[int]:
    """Batch sizes to look at: all up to 256, above that in steps of 2 %."""
    few = range(1, min(most, 256) + 1)
    many = np.geomspace(256, most, max(2, math.ceil(math.log(most / 256, 1.02)))).astype(int).tolist() if most > 256 else []
    return sorted({*few, *many})


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
    """Throughput, hours and dollars. `batch` None: the one of highest throughput of those that fit.

    Raises DoesNotFit for a GPU on which not one query fits, or without bf16 (unless it is the one that was measured); UserError for what
    no GPU could do.
    """
    if batch is not None and batch < 1:
        raise UserError(f"batch = {batch}: expected at least 1")
    step = choose(entries, job.model, job.method, gpu, table)
    step.check_share(job.share)
    if not gpu.bf16 and not step.measured:
        raise DoesNotFit(f"{gpu.name} has no bf16, in which these times were measured: a GPU of compute capability 8.0 or newer has")
    fits = room.largest(job, gpu, table)
    notes = []
    if batch is None:
        most = min(fits, job.largest_batch)
        batch = max(batches(most), key=lambda b: b / step.seconds(job.tokens(b), job.share))
        of = f"up to {fits} that fit" if fits == most else f"up to {most}, all that there are; {fits:,} fit"
        notes.append(f"batch {batch}: the fastest of {of} by {room.by}{room.also}")
    elif batch > fits:
        notes.append(f"batch {batch} is more than {room.by} has room for{room.also}: {fits} queries, the longest of {job.longest} tokens")
    if room.rows_known is not None and job.longest > room.rows_known:
        notes.append(f"extrapolated: {room.by} was made for rows of at most {room.rows_known:,} tokens, here are {job.longest:,}")
    tokens = job.tokens(batch)
    notes += step.beyond(tokens, job.share, job.longest)
    if step.doubt is not None:
        notes.append(f"do not trust these coefficients: {step.doubt}")
    least = job.work.least_seconds(gpu, tokens, job.share)
    seconds = step.seconds(tokens, job.share)
    if seconds < least:
        notes.append(f"the coefficients give {seconds:.3g} s a step, less than the GPU's peaks allow: {least:.3g} s is taken")
    seconds = max(seconds, least)
    ends = step.interval(tokens, job.share, LEVEL)
    interval = None if ends is None else (max(ends[0], least), max(ends[1], least))
    if interval is None:
        notes.append("no interval: the coefficients come without samples")
    hours_a_second = job.queries * job.epochs / batch / 3600
    usd_a_second = None if price is None else hours_a_second * price.usd_per_hour

    def scaled(factor: float | None) -> Interval:
        return None if interval is None or factor is None else (factor * interval[0], factor * interval[1])

    return Prediction(
        gpu=gpu.name,
        batch=batch,
        fits=fits,
        tokens_per_step=tokens,
        step_seconds=seconds,
        queries_per_second=batch / seconds,
        queries_per_second_interval=None if interval is None else (batch / interval[1], batch / interval[0]),
        hours=hours_a_second * seconds,
        hours_interval=scaled(hours_a_second),
        usd=None if usd_a_second is None else usd_a_second * seconds,
        usd_interval=scaled(usd_a_second),
        price=price,
        measured=step.measured,
        basis=step.basis,
        notes=tuple(notes),
    )


class Asked(NamedTuple):
    """A job on each of these GPUs. entries: of the software whose times are predicted; offers: prices, of which those on demand count, or
    the `spot` ones; table: GPUs that may be named where one does not do."""

    job: Job
    gpus: Sequence[GPU]
    entries: Sequence[Entry]
    offers: Sequence[Price]
    table: dict[str, GPU]
    spot: bool = False
    room: Room = EQUATION_1


def predict_all(asked: Asked, batch: int | None = None) -> tuple[list[Prediction], dict[str, DoesNotFit]]:
    """(each GPU at its lowest price, the GPUs that do not do and why). Raises UserError where none does."""
    found: list[Prediction] = []
    left_out: dict[str, DoesNotFit] = {}
    job, gpus, entries, offers, table, spot, room = asked
    for gpu in gpus:
        try:
            price = cheapest(offers, gpu.name, spot=spot)
            found.append(predict(job, gpu, entries, table, batch=batch, price=price, room=room))
        except DoesNotFit as error:
            left_out[gpu.name] = error
    if not found:
        (told, *more) = [str(why) for why in left_out.values()] if len(left_out) == 1 else refusals(left_out)
        cut = f" ({'; '.join(job.told[1:])})" if job.told[1:] and any(why.what for why in left_out.values()) else ""
        raise UserError("; ".join([told, *more]) + cut)
    return found, left_out


@dataclass(frozen=True)
class Plan:
    """All options by dollars (those without a price last, by hours), the GPUs left out and why, and the three answers (None: no option
    with a price does)."""

    options: tuple[Prediction, ...]
    left_out: dict[str, DoesNotFit]
    cheapest: Prediction | None
    fastest_under_budget: Prediction | None
    cheapest_by_deadline: Prediction | None


def plan(asked: Asked, *, budget_usd: float | None = None, deadline_hours: float | None = None) -> Plan:
    """Every GPU at its fastest batch and lowest price. Raises UserError for a budget or deadline that is not positive."""
    for name, value in (("budget", budget_usd), ("deadline", deadline_hours)):
        if value is not None and not value > 0:
            raise UserError(f"{name} = {value:g}: expected more than 0")
    options, left_out = predict_all(asked)

    def dollars(p: Prediction) -> float:
        return math.inf if p.usd is None else p.usd

    options.sort(key=lambda p: (dollars(p), p.hours))
    priced = [p for p in options if p.usd is not None]
    return Plan(
        tuple(options),
        left_out,
        min(priced, key=dollars, default=None),
        min((p for p in priced if budget_usd is None or dollars(p) <= budget_usd), key=lambda p: p.hours, default=None),
        min((p for p in priced if deadline_hours is None or p.hours <= deadline_hours), key=dollars, default=None),
    )
