"""A run on a card in seconds, hours and dollars: of this program, or of another tool that trains the same. No jax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from moejax.errors import UserError
from moejax.estimator import closed_form, links, memory, own, spread
from moejax.estimator.links import Link
from moejax.estimator.memory import DoesNotFit
from moejax.estimator.prices import Price
from moejax.estimator.receipts import Receipt
from moejax.estimator.sizes import stored
from moejax.estimator.tools import fitted, peak, work
from moejax.estimator.tools.fitted import Fitted
from moejax.estimator.tools.peak import Peaks
from moejax.estimator.units import Gigabytes
from moejax.estimator.workload import BESIDES, Workload
from moejax.gpus import GPU

OTHERS = ("unsloth", "e4b")
LEVEL = fitted.LEVEL
Interval = tuple[float, float]
_NF4 = {"nf4": "nf4", "nf4-double": "nf4+dq", "mxfp4": "mxfp4"}
_FREE, _MEMORY_ERROR = 0.97, 0.08
"""Of a card's memory what another tool can take; of its peak what is as likely wrong as not."""


@dataclass(frozen=True)
class Forecast:
    """One run on one card. Seconds are of an optimizer step; intervals hold a measured run with `LEVEL`. measured: whether a step of this
    software was measured on this card."""

    gpu: str
    step_seconds: float
    step_seconds_interval: Interval
    tokens_per_second: float
    steps: int
    hours: float
    hours_interval: Interval
    besides_hours: float
    usd: float | None
    usd_interval: Interval | None
    price: Price | None
    peak_gb: float
    peak_gb_interval: Interval
    memory_gb: float
    measured: bool
    basis: str
    changes: str = ""
    devices: int = 1
    link: str | None = None
    link_bytes: float = 0.0
    link_seconds: float = 0.0

    @property
    def on(self) -> str:
        return links.several(self.gpu, self.devices)

    @property
    def memory(self) -> str:
        """`32.1 of 84.9 GB`, `74 MB of 84.9 GB`."""
        peak = f"{self.peak_gb:.1f}" if self.peak_gb >= 0.1 else f"{Gigabytes(self.peak_gb)}"
        return f"{peak} of {self.memory_gb:.1f} GB"

    @property
    def named(self) -> str:
        """The cards, marked where nothing was measured on one."""
        return self.on if self.measured else f"{self.on} *"


@dataclass(frozen=True)
class Forecasts:
    """Of one software: `moejax`, or one of `OTHERS` (version: None, the newest with a receipt). link: between several cards (None: by the
    table); overlap: the share of its time that work hides."""

    tool: str
    receipts: Sequence[Receipt]
    table: dict[str, GPU]
    version: str | None = None
    link: Link | None = None
    overlap: float = 0.0

    @cached_property
    def _fitted(self) -> Fitted:
        return Fitted(fitted.points(self.receipts, self.table))

    @cached_property
    def _peaks(self) -> Peaks:
        return peak.peaks(self.receipts, self.table)

    def of(self, job: Workload, gpu: GPU, price: Price | None) -> Forecast:
        """Raises DoesNotFit for a card without room, or without bf16."""
        if self.tool != "moejax":
            return self._others(job, gpu, price)
        if not gpu.bf16 and job.experiment.training.asks_bf16:
            raise DoesNotFit(f"{gpu.name} has no bf16, which the training section asks for")
        return self._own(job, gpu, price)

    def _own(self, job: Workload, gpu: GPU, price: Price | None) -> Forecast:
        e, tokens = job.experiment, round(job.row_tokens)
        held = closed_form.on(gpu, own.settled(e), job.config, job.rows, job.longest_row).total
        sure, possible = memory.by_gpu(gpu, e.device.memory_fraction)
        if held > possible:
            others = [g for g in self.table.values() if g.bf16 or not e.training.asks_bf16]
            raise memory.too_large(
                f"{job.rows} x {job.longest_row} tokens", held, gpu, e.device.memory_fraction, others,
                lambda g: closed_form.on(g, own.settled(e), job.config, job.rows, job.longest_row).total, closed=True,
            )  # fmt: skip
        told = own.estimate(own.program_seconds(e, job.config, gpu, job.rows, tokens), gpu, self.receipts)
        close = "" if held <= sure else "; whether it fits is too close to call (moejax estimate memory compiles)"
        gb = held / 1e9
        error, n = memory.error_on(gpu), spread.count(e)
        link = None if n == 1 else self.link or links.between(gpu, n)
        moved = spread.traffic(e, job.config, job.rows * job.row_tokens).total
        waited = 0.0 if link is None else (1 - self.overlap) * moved / link.rate
        low, high = told.interval
        found = _forecast(
            job, gpu, price, told.seconds + waited, (low + waited, high + waited), job.steps, gb, (gb * (1 - error), gb * (1 + error)),
            told.measured, told.basis + close,
        )  # fmt: skip
        return found if link is None else replace(found, devices=n, link=link.name, link_bytes=moved, link_seconds=waited)

    def _others(self, job: Workload, gpu: GPU, price: Price | None) -> Forecast:
        asked = recipe(job, self.tool, self.version)
        held = self._peaks.estimate(asked)
        free = _FREE * gpu.memory_bytes / 1e9
        if held.gb * (1 - _MEMORY_ERROR) > free:
            raise DoesNotFit(f"{held.gb:.1f} GB, {held.gb - free:.1f} GB more than the {gpu.name} has for it", what=f"{self.tool} takes")
        close = "" if held.gb <= free else "; whether it fits is too close to call"
        told = self._fitted.estimate(asked, gpu)
        measured = told.novel in ("neither", "model")
        basis = told.basis + close
        return _forecast(job, gpu, price, told.seconds, told.interval, job.other_steps, held.gb, held.interval, measured, basis)


def recipe(job: Workload, tool: str, version: str | None) -> work.Recipe:
    """The same run by another tool: rows are queries, padded to the longest of a micro-batch. Raises UserError for what it cannot train."""
    e = job.experiment
    if e.adapter is None:
        raise UserError(f"--tool {tool}: its receipts are of adapters, and all weights are trained here (adapter: null): add one")
    if e.preference is not None:
        raise UserError(f"--tool {tool}: its receipts are of supervised training, and the config trains on preferences")
    kinds = e.kinds(job.config)
    kind = _NF4.get(kinds.get("experts", ""), "bf16")
    trained = float(sum(w.size for w in stored(e, job.config) if w.trained))
    on_experts = [t for t in e.adapter.lora.of(job.config) if any(p in job.config.groups["experts"] for p in job.config.targets[t])]
    if on_experts:  # both tools train fused gate and up projections, which share an A
        rank = max(pair.rank for pair in e.adapter.lora.of(job.config).values())
        trained = min(trained, float(work.adapter_weights(job.config, rank)))
    return work.Recipe(
        tool, version, _name(job), job.config, None, kind, e.placement.experts != "device", trained, e.training.optimizer, job.rows,
        job.accumulation, job.mean_tokens, job.padded_tokens,
    )  # fmt: skip


def _name(job: Workload) -> str:
    """As receipts name it: the preset of the same sizes, or the source's own."""
    from moejax.models.config import PRESETS

    m = job.experiment.model
    same = (name for name, sizes in PRESETS.items() if type(sizes) is type(job.config) and sizes.linears == job.config.linears)
    return next(same, m.preset or str(m.source).rsplit("/", 1)[-1].lower())


def _forecast(
    job: Workload, gpu: GPU, price: Price | None, seconds: float, interval: Interval, steps: int, gb: float, gb_interval: Interval,
    measured: bool, basis: str,
) -> Forecast:  # fmt: skip
    besides = [job.besides_seconds(s / job.accumulation) * by for s, by in zip((seconds, *interval), (1.0, *BESIDES), strict=True)]
    hours, low, high = ((steps * s + beside) / 3600 for s, beside in zip((seconds, *interval), besides, strict=True))
    rate = None if price is None else spread.count(job.experiment) * price.usd_per_hour
    tokens = job.queries * job.epochs * job.mean_tokens / steps if job.experiment.training.steps is None else (
        job.rows * job.accumulation * job.mean_tokens
    )  # fmt: skip
    return Forecast(
        gpu.name, seconds, interval, tokens / seconds, steps, hours, (low, high), besides[0] / 3600,
        None if rate is None else rate * hours, None if rate is None else (rate * low, rate * high), price, gb, gb_interval,
        gpu.memory_bytes / 1e9, measured, basis,
    )  # fmt: skip

