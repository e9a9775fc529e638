"""Throughput, hours and dollars of a run on a GPU, and which GPU to take."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from moejax.errors import UserError
from moejax.estimator import links, spread, units
from moejax.estimator.coefficients import Entry, choose
from moejax.estimator.job import Job
from moejax.estimator.links import Link
from moejax.estimator.memory import DoesNotFit, refusals
from moejax.estimator.prices import Price, cheapest
from moejax.estimator.room import EQUATION_1, Room
from moejax.gpus import GPU

LEVEL = 0.95
Interval = tuple[float, float] | None


@dataclass(frozen=True)
class Prediction:
    """A run on one GPU, or several. Intervals hold one measured run with 95 %; None: nothing is known about the error, or there is no
    price."""

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
    devices: int = 1
    link: str | None = None
    link_bytes: float = 0.0
    link_seconds: float = 0.0  # of step_seconds, what nothing hides

    @property
    def named(self) -> str:
        return links.several(self.gpu, self.devices)


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
    link: Link | None = None,
    overlap: float = 0.0,
) -> Prediction:
    """Throughput, hours and dollars. `batch` None: the one of highest throughput of those that fit. Several cards: each computes its part
    of the batch as one alone would; what goes over the `link` between them is added, but for the share `overlap` that work hides.

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
    between = _between(job, gpu, link, overlap)
    n = job.devices

    def seconds_of(batch: int) -> float:
        tokens = job.tokens(batch)
        return step.seconds(tokens / n, job.share) + between.seconds(tokens)

    if batch is None:
        most = min(fits, job.largest_batch)
        if most < n:
            raise UserError(f"{job.largest_batch} queries for {n} devices: fewer of them, or more queries")
        batch = max((n * each for each in batches(most // n)), key=lambda b: b / seconds_of(b))
        of = f"up to {fits} that fit" if fits == most else f"up to {most}, all that there are; {fits:,} fit"
        notes.append(f"batch {batch}: the fastest of {of} by {room.by}{room.also}")
    elif batch % n:
        raise UserError(f"--batch {batch}: of all {n} devices together, which do not divide it: expected a multiple of {n}")
    elif batch > fits:
        notes.append(f"batch {batch} is more than {room.by} has room for{room.also}: {fits} queries, the longest of {job.longest} tokens")
    if room.rows_known is not None and job.longest > room.rows_known:
        notes.append(f"extrapolated: {room.by} was made for rows of at most {room.rows_known:,} tokens, here are {job.longest:,}")
    tokens = job.tokens(batch)
    notes += [*between.told(tokens), *step.beyond(tokens / n, job.share, job.longest)]
    if step.doubt is not None:
        notes.append(f"do not trust these coefficients: {step.doubt}")
    least = job.work.least_seconds(gpu, tokens / n, job.share)
    seconds = step.seconds(tokens / n, job.share)
    if seconds < least:
        notes.append(f"the coefficients give {seconds:.3g} s a step, less than the GPU's peaks allow: {least:.3g} s is taken")
    waited = between.seconds(tokens)
    seconds = max(seconds, least) + waited
    ends = step.interval(tokens / n, job.share, LEVEL)
    interval = None if ends is None else (max(ends[0], least) + waited, max(ends[1], least) + waited)
    if interval is None:
        notes.append("no interval: the coefficients come without samples")
    hours_a_second = job.queries * job.epochs / batch / 3600
    usd_a_second = None if price is None else hours_a_second * n * price.usd_per_hour

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
        devices=n,
        link=None if between.link is None else between.link.name,
        link_bytes=between.bytes(tokens),
        link_seconds=waited,
    )


@dataclass(frozen=True)
class _Between:
    """What goes between the cards of a job in a step of this many tokens. link None: there is one."""

    job: Job
    link: Link | None
    overlap: float
    fixed: float  # bytes a step
    a_token: float

    def bytes(self, tokens: float) -> float:
        return self.fixed + self.a_token * tokens

    def seconds(self, tokens: float) -> float:
        return 0.0 if self.link is None else (1 - self.overlap) * self.bytes(tokens) / self.link.rate

    def told(self, tokens: float) -> list[str]:
        if self.link is None:
            return []
        over = f"{self.link.name}, {self.link.rate / 1e9:.4g} GB/s"
        uneven = "; as if every card's experts had as many tokens" if self.job.weights == "experts" else ""
        return [
            f"weights {self.job.weights}: each card receives {units.told(self.bytes(tokens))} a step over {over}, "
            f"{self.seconds(tokens):.3g} s, {self.overlap:.0%} hidden behind work (--overlap){uneven}"
        ]


def _between(job: Job, gpu: GPU, link: Link | None, overlap: float) -> _Between:
    """Traffic is a constant and so much a token."""
    if job.devices == 1:
        return _Between(job, None, overlap, 0.0, 0.0)
    config = job.config.replace(experts_per_token=job.experts_per_token)
    none, one = (spread.traffic(job.experiment, config, tokens).total for tokens in (0, 1))
    return _Between(job, link or links.between(gpu, job.devices), overlap, none, one - none)


class Asked(NamedTuple):
    """A job on each of these GPUs. entries: of the software whose times are predicted; offers: prices, of which those on demand count, or
    the `spot` ones; table: GPUs that may be named where one does not do. devices: of each GPU this many; link, overlap: as of `predict`."""

    job: Job
    gpus: Sequence[GPU]
    entries: Sequence[Entry]
    offers: Sequence[Price]
    table: dict[str, GPU]
    spot: bool = False
    room: Room = EQUATION_1
    devices: tuple[int, ...] = (1,)
    link: Link | None = None
    overlap: float = 0.0


def predict_all(asked: Asked, batch: int | None = None) -> tuple[list[Prediction], dict[str, DoesNotFit]]:
    """(each GPU at its lowest price, the GPUs that do not do and why). Raises UserError where none does."""
    found: list[Prediction] = []
    left_out: dict[str, DoesNotFit] = {}
    job = asked.job
    for gpu, n in itertools.product(asked.gpus, asked.devices):
        several = replace(job, devices=n)
        try:
            price = cheapest(asked.offers, gpu.name, spot=asked.spot)
            found.append(
                predict(
                    several, gpu, asked.entries, asked.table, batch=batch, price=price, room=asked.room, link=asked.link,
                    overlap=asked.overlap,
                )
            )  # fmt: skip
        except DoesNotFit as error:
            left_out[links.several(gpu.name, n)] = error
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
