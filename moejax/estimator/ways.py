"""The ways to train a config on one GPU, or on several: where its experts lie, which optimizer, rank and rows; what fits, what each other
lacks. No jax.

Every way does the same optimizer step: the config's rows in all, in as few micro-batches as fit. Bytes are the closed form's, its error
allowed for (`memory.by_gpu`). Seconds are a floor, by the data sheet's peaks and the bus: an order, not a forecast. What goes
between devices is added whole: nothing is taken to hide it.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moejax.estimator import bus, closed_form, memory, placing, spread
from moejax.estimator.floors import floors
from moejax.estimator.units import told

if TYPE_CHECKING:
    from moejax.config import Experiment, TrainingConfig
    from moejax.estimator.links import Link
    from moejax.gpus import GPU
    from moejax.models.config import Architecture

LEAST_RANK = 4
SHORTEST_ROW = 128
MODES = (
    {"training.remat": "full", "training.accumulation": "layer_major"},
    {"training.remat": "full", "training.accumulation": "micro_batch_major"},
    {"training.remat": "offload", "training.accumulation": "layer_major"},
    {"training.remat": "offload", "training.accumulation": "micro_batch_major"},
)
"""How a step keeps and orders its work: the first of the fastest is taken. Policies that recompute less are a run's own choice (auto)."""


@dataclass(frozen=True)
class Way:
    """One way. changes: what differs from the config, key -> value; rows, row_tokens: of a micro-batch, on all devices. Bytes on the device
    and in the host's memory with these rows (of what is refused, with one); seconds of an optimizer step on the device, on the bus and
    between devices. refused: by how much it does not fit, and the smallest change with which it would; None where it fits. resident: the
    share of the layers whose experts are on the device while others' are not."""

    changes: Mapping[str, Any]
    experiment: Experiment
    rows: int
    row_tokens: int
    peak_bytes: int
    host_bytes: int
    compute_seconds: float
    bus_seconds: float
    resident: float = 0.0
    refused: str | None = None
    link_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """What is fetched ahead hides behind what is computed, or the other way round: in the layers whose experts are fetched."""
        alone = self.resident * self.compute_seconds
        return alone + max(self.compute_seconds - alone, self.bus_seconds) + self.link_seconds

    @property
    def tokens_per_second(self) -> float:
        return self.rows * self.experiment.training.gradient_accumulation * self.row_tokens / self.seconds


@dataclass(frozen=True)
class Asked:
    """What is planned: a config, its sizes and rows, and the GPU. others: which may be named where this one does not do. link: between the
    devices of the config's mesh."""

    experiment: Experiment
    config: Architecture
    gpu: GPU
    row_tokens: int
    others: tuple[GPU, ...] = ()
    link: Link | None = None

    @property
    def devices(self) -> int:
        return spread.count(self.experiment)

    @property
    def by_host(self) -> bool:
        """Whether weights and streams may lie in the host's memory: no rate of a TPU's link to it is published."""
        return self.gpu.platform != "tpu"

    def peak(self, experiment: Experiment, rows: int, row_tokens: int | None = None, gpu: GPU | None = None) -> closed_form.Breakdown:
        return closed_form.on(gpu or self.gpu, experiment, self.config, rows, row_tokens or self.row_tokens)

    def limit(self, gpu: GPU | None = None) -> float:
        """Bytes up to which the closed form is sure."""
        return memory.by_gpu(gpu or self.gpu, self.experiment.device.memory_fraction)[0]


def ways(asked: Asked) -> list[Way]:
    """Of every placement and optimizer its fastest mode, and where not one row fits the highest lower rank with which one does; where all
    experts do not fit on the device, also with the most layers' that do. What fits, fastest first, the config's own rank before lower ones,
    which train another adapter; then what does not, by what it lacks."""
    found = []
    for changes in _settings(asked):
        may_split = asked.by_host and changes["placement.experts"] == "device" and changes.get("mesh.weights") != "spread"
        for rank in _ranks(asked.experiment):
            modes = [{**changes, **rank, **mode} for mode in _modes(asked)]
            tried = [_tried(asked, mode) for mode in modes]
            fitting = [way for way in tried if way.refused is None]
            if fitting:
                found.append(min(fitting, key=lambda w: w.seconds))
            elif not rank:
                found.append(_mended(asked, min(tried, key=lambda w: w.peak_bytes)))
            if fitting:
                break
            split = [way for mode in modes for way in _split(asked, mode)] if may_split else []
            if split:
                found.append(min(split, key=lambda w: w.seconds))
                may_split = False
    return sorted(found, key=_order)


def _order(way: Way) -> tuple[bool, bool, float]:
    fits = way.refused is None
    return not fits, "adapter.rank" in way.changes, way.seconds if fits else way.peak_bytes


def _modes(asked: Asked) -> Iterable[Mapping[str, Any]]:
    """Without what the config excludes: the micro-batches of pairs pass one by one."""
    modes = MODES if asked.by_host else [mode for mode in MODES if mode["training.remat"] != "offload"]
    if asked.experiment.preference is not None:
        return [mode for mode in modes if mode["training.accumulation"] != "layer_major"]
    return modes


def _settings(asked: Asked) -> Iterator[dict[str, Any]]:
    """Placement, optimizer, and what each of several devices holds."""
    t, p = asked.experiment.training, asked.experiment.placement
    optimizers = (t.optimizer, "adamw_8bit") if _may_be_8bit(t) else (t.optimizer,)
    placements = ("device", "host") if asked.experiment.adapter is not None else (p.experts,)
    placements = placements if asked.by_host else ("device",)
    for weights, placement, optimizer in itertools.product(_weights(asked.experiment, asked.config), placements, optimizers):
        if weights.get("mesh.weights") != "spread" or placement == "device":
            yield {**weights, "placement.experts": placement, "training.optimizer": optimizer}


def _weights(experiment: Experiment, config: Architecture) -> list[dict[str, str]]:
    """Of several devices, `mesh.weights` that the config may say."""
    n = spread.count(experiment)
    if n == 1:
        return [{}]
    may = {"whole": True, "spread": experiment.adapter is not None, "experts": config.num_experts % n == 0}
    return [{"mesh.weights": name} for name, possible in may.items() if possible]


def _may_be_8bit(t: TrainingConfig) -> bool:
    """Whether adamw's moments may be in 8 bits with the rest of the section: what a config may not say is no way."""
    return t.optimizer == "adamw" and not t.rounds_stochastically


def _ranks(experiment: Experiment) -> Iterator[dict[str, Any]]:
    """The config's own (no change), then halves of it, down to `LEAST_RANK`."""
    yield {}
    if experiment.adapter is None:
        return
    rank = experiment.adapter.rank
    by_name = dict(rank) if isinstance(rank, Mapping) else {"": rank}
    while max(by_name.values()) > LEAST_RANK:
        by_name = {name: max(min(LEAST_RANK, value), value // 2) for name, value in by_name.items()}
        yield {"adapter.rank": by_name.get("", by_name)}


def changed(experiment: Experiment, changes: Mapping[str, Any]) -> Experiment:
    """The experiment with `section.key` -> value."""
    for name, value in changes.items():
        section, _, key = name.partition(".")
        experiment = experiment.changed(section, **{key: value})
    return experiment


def _tried(asked: Asked, changes: Mapping[str, Any]) -> Way:
    """With as many rows a micro-batch as fit and divide the step's; refused with one."""
    for rows in _rows(asked.experiment):
        way = _way(asked, changes, rows)
        if way.refused is None:
            break
    return way


def _split(asked: Asked, changes: Mapping[str, Any]) -> Iterator[Way]:
    """For all rows a micro-batch with which some layers' experts fit on the device, not all: with the most."""
    layers = asked.config.expert_layers
    if layers < 2 or asked.experiment.adapter is None:
        return
    of_layer = placing.expert_bytes(asked.experiment, asked.config) / layers
    for rows in _rows(asked.experiment):

        def peak_bytes(n: int, rows: int = rows) -> int:
            return _way(asked, {**changes, "placement.experts": n}, rows).peak_bytes

        n = placing.most_layers(peak_bytes, layers, of_layer, asked.limit())
        if 0 < n < layers:
            yield _way(asked, {**changes, "placement.experts": n}, rows)


def _rows(own: Experiment) -> list[int]:
    """Of a micro-batch: what divides the step's, most first."""
    sides_apart = own.preference is not None and own.data.batching != "pack"  # a pair's sides are two rows of a micro-batch
    devices = spread.count(own)
    found = _divisors(own.data.batch_rows * own.training.gradient_accumulation // devices)
    return [devices * n for n in found if not (sides_apart and n % 2)]


def _way(asked: Asked, changes: Mapping[str, Any], rows: int) -> Way:
    """With this many rows a micro-batch."""
    own, gpu = asked.experiment, asked.gpu
    total = own.data.batch_rows * own.training.gradient_accumulation
    # What a run's own choice comes down to on a full card is no change.
    chosen_by_auto = [("training.remat", "full")] if own.training.remat == "auto" else []
    settings = {**changes, "data.batch_rows": rows, "training.gradient_accumulation": total // rows}
    if rows == total:
        settings["training.accumulation"] = "micro_batch_major"  # there is one
    step = changed(own, settings)
    made = asked.peak(step, rows)
    shown = {name: value for name, value in settings.items() if value != _at(own, name) and (name, value) not in chosen_by_auto}
    of_micro = floors(step, asked.config, rows // asked.devices, asked.row_tokens)
    compute = sum(s.seconds(gpu.rate(step.training.compute_dtype), gpu.bytes_per_second)[0] for s in of_micro) * (total // rows)
    over_bus = bus.step_bytes(step, asked.config, rows // asked.devices, asked.row_tokens, made.host) / bus.rate(gpu)
    between = 0.0 if asked.link is None else spread.traffic(step, asked.config, rows * asked.row_tokens).total / asked.link.rate
    layers = asked.config.expert_layers
    on_device = step.placement.on_device(layers)
    resident = on_device / layers if on_device < layers else 0.0
    lacks = made.total - asked.limit()
    one = "one row" if asked.devices == 1 else "one row on each"
    refused = None if lacks <= 0 else f"{told(made.total)} with {one}, {told(lacks)} too much"
    return Way(shown, step, rows, asked.row_tokens, made.total, made.host, compute, over_bus, resident, refused, between)


def _divisors(number: int) -> list[int]:
    """Largest first."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)}, reverse=True)


def _at(experiment: Experiment, name: str) -> Any:
    section, _, key = name.partition(".")
    return getattr(getattr(experiment, section), key)


def _mended(asked: Asked, way: Way) -> Way:
    """A refused way with the smallest change that makes it fit: another optimizer, a lower rank, shorter rows, the host, a larger card."""

    def fits(changes: Mapping[str, Any], row_tokens: int | None = None) -> bool:
        return asked.peak(changed(way.experiment, changes), asked.devices, row_tokens).total <= asked.limit()

    single: list[dict[str, Any]] = [{"training.optimizer": "adamw_8bit"}] if _may_be_8bit(way.experiment.training) else []
    single += [rank for rank in _ranks(way.experiment) if rank]
    for changes in single:
        if fits(changes):
            return replace(way, refused=f"{way.refused}; {written(changes)} would fit")
    lengths = range(SHORTEST_ROW, asked.row_tokens // 2 + 1, 16)
    fitting = bisect.bisect(lengths, False, key=lambda length: not fits({}, length))  # a longer row takes more
    if fitting:
        return replace(way, refused=f"{way.refused}; rows of {lengths[fitting - 1]} tokens would fit")
    in_host = way.experiment.adapter is not None and way.experiment.placement.experts == "device" and not _is_spread(way.experiment)
    if asked.by_host and in_host and fits({"placement.experts": "host"}):
        return replace(way, refused=f"{way.refused}; placement.experts=host would fit")
    larger = [g for g in asked.others if asked.peak(way.experiment, asked.devices, gpu=g).total <= asked.limit(g)]
    return replace(way, refused=f"{way.refused}; {memory.would_do(sorted(larger, key=lambda g: g.memory_gb)[:1])}")


def _is_spread(experiment: Experiment) -> bool:
    return experiment.mesh is not None and experiment.mesh.weights == "spread"


def written(changes: Mapping[str, Any]) -> str:
    """As a command line takes them."""
    texts = []
    for name, value in changes.items():
        several = isinstance(value, Mapping)
        of_several = ", ".join(f"{key}: {one}" for key, one in value.items()) if several else ""
        texts.append(f"'{name}={{{of_several}}}'" if several else f"{name}={value}")
    return " ".join(texts)
