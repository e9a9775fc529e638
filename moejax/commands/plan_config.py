"""`moejax estimate plan CONFIG`: list the placements that fit a GPU, and how much memory the others lack."""

from __future__ import annotations

import argparse
import itertools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moejax import config, config_data, gpus, tpus
from moejax.commands.arguments import check_counts, check_kernels, counts_of, names_of, on_devices, with_experts
from moejax.commands.tables import print_json, show_table
from moejax.device import HERE, this_machine, with_peaks
from moejax.errors import UserError
from moejax.estimator import links, own, prices, receipts, slices, spread
from moejax.estimator.links import Link
from moejax.estimator.receipts import Receipt
from moejax.estimator.sizes import architecture_of, model_folder
from moejax.estimator.units import counted, gigabytes
from moejax.estimator.ways import Asked, Way, ways, written
from moejax.gpus import GPU
from moejax.models.config import Architecture

_OF_A_JOB = ("dataset", "records", "length", "lengths", "epochs", "budget", "deadline", "plot", "html", "batch", "weights",
             "overlap")  # fmt: skip


def asked(options: argparse.Namespace) -> bool:
    """Whether it is asked how a config fits on named cards: without what only hours and dollars need."""
    of_a_job = any(getattr(options, name) is not None for name in _OF_A_JOB)
    return options.config is not None and options.gpu is not None and options.tool in (None, "moejax") and not of_a_job


def plan(options: argparse.Namespace) -> int:
    """Placements, optimizers, ranks and rows of a config on named cards."""
    check_counts(options, "seq_len")
    experiment = config.load(options.config, options.overrides)
    from moejax.runs import tokens  # jax comes with it

    experiment = tokens.with_rows(experiment, model_folder(experiment), fetch=False)
    sizes = architecture_of(experiment)
    experiment = experiment.with_defaults(sizes)
    sizes = with_experts(sizes, options.experts_per_token)
    row_tokens = options.seq_len or experiment.data.longest_text
    if row_tokens > sizes.max_position_embeddings:
        raise UserError(f"rows of {row_tokens} tokens exceed the model's max_position_embeddings = {sizes.max_position_embeddings}")
    row_tokens = config_data.whole_row(row_tokens)
    table = gpus.from_yaml(options.gpu_file) if options.gpu_file else gpus.GPUS
    others = tuple(gpu for gpu in table.values() if gpu.bf16 or not experiment.training.asks_bf16)
    found: dict[str, tuple[GPU, list[Way], Link | None]] = {}
    in_mesh = experiment.mesh.devices if experiment.mesh else None
    counts = [in_mesh or 1] if options.devices is None else counts_of(options.devices)
    rows = experiment.data.batch_rows * experiment.training.gradient_accumulation
    for card, count in _targets(options, experiment, table, counts):
        name = links.several(card.name, count)
        check_kernels(experiment, sizes, [card])
        if rows % count:
            raise UserError(f"{name} ({count} devices) do not divide the step's {counted(rows, 'row')}: data.batch_rows is of all devices")
        on = on_devices(experiment, sizes, count)
        link = None if count == 1 else links.between(card, count) if options.link is None else links.given(options.link)
        found[name] = card, ways(Asked(on, sizes, card, row_tokens, others, link)), link
    known = receipts.with_own(options.receipts, table)
    if options.json:
        facts = {
            gpu: [_facts(way, None if way.refused else _seconds(way, sizes, card, known)) for way in several]
            for gpu, (card, several, _) in found.items()
        }
        print_json({"config": experiment.name, "row_tokens": row_tokens, "gpus": facts})
        return 0
    print("Times are those of moejax (this program), a roofline of the compiled program times an efficiency (docs/estimator.md#whose-time)")
    for gpu, (card, several, link) in found.items():
        seconds = {id(way): _seconds(way, sizes, card, known) for way in several if way.refused is None}
        besides = slices.precision(experiment) if card.platform == "tpu" else []
        lent = prices.cheapest(prices.load(options.prices, table), card.name, devices=spread.count(several[0].experiment))
        if seconds and lent is not None and lent.hours_per_week is not None:
            steps = lent.hours_per_week * 3600 / next(iter(seconds.values())).seconds
            besides.append(f"{lent.told}: about {steps:,.0f} steps of the first a week (--resume continues)")
        _show(experiment, gpu, several, link, [options.config, *options.overrides], sizes.expert_layers, seconds, besides)
    return 0


def _targets(
    options: argparse.Namespace, experiment: config.Experiment, table: Mapping[str, GPU], counts: Sequence[int]
) -> list[tuple[GPU, int]]:
    """Each card, or slice of TPU chips, and how many. Raises UserError for what does not run there."""
    found: list[tuple[GPU, int]] = []
    for name in names_of(options.gpu):
        if (tpu := tpus.find(name)) is not None:
            slices.check(tpu, experiment, devices=options.devices)
            found.append((tpu.chip, tpu.count))
            continue
        card = _here(experiment) if name == HERE else gpus.find(name, dict(table))
        if not card.bf16 and experiment.training.asks_bf16:
            raise UserError(
                f"{card.name} has no bf16, which the training section asks for: a run is refused there; expected "
                "training.compute_dtype=float32 training.param_dtype=float32, or another GPU"
            )
        found += itertools.product([card], counts)
    return list(dict.fromkeys(found))


def _seconds(way: Way, sizes: Architecture, card: GPU, known: Sequence[Receipt]) -> own.Estimate:
    """With what goes between devices, which no efficiency is told of."""
    told = own.estimate(own.program_seconds(way.experiment, sizes, card, way.rows, way.row_tokens), card, known)
    low, high = told.interval
    return replace(told, seconds=told.seconds + way.link_seconds, interval=(low + way.link_seconds, high + way.link_seconds))


def _here(experiment: config.Experiment) -> GPU:
    card = this_machine(experiment.device.memory_fraction)
    if card.platform == "cpu":
        raise UserError(
            f"--gpu {HERE}: this machine has a CPU only ({card.name}), with one memory and no bus: name a GPU, e.g. --gpu RTX-4090; "
            f"`memory --gpu {HERE}` says what fits"
        )
    return with_peaks(card)


def _facts(way: Way, told: own.Estimate | None) -> dict[str, Any]:
    return {
        "seconds": None if told is None else told.seconds, "seconds_interval": None if told is None else told.interval,
        "changes": dict(way.changes), "rows": way.rows, "accumulation": way.experiment.training.gradient_accumulation,
        "device_gb": way.peak_bytes / 1e9, "host_gb": way.host_bytes / 1e9, "least_seconds": way.seconds,
        "compute_seconds": way.compute_seconds, "bus_seconds": way.bus_seconds, "link_seconds": way.link_seconds, "refused": way.refused,
    }  # fmt: skip


def _show(
    experiment: config.Experiment, gpu: str, several: Sequence[Way], link: Link | None, given: Sequence[str], layers: int,
    seconds: Mapping[int, own.Estimate], besides: Sequence[str],
) -> None:  # fmt: skip
    fitting = [way for way in several if way.refused is None]
    first = several[0]
    total = first.rows * first.experiment.training.gradient_accumulation
    columns = ["experts", "optimizer", "rank", "keeps", "rows", "GB on the device", "in the host", "s a step (90 %)", "at least", "bus, s"]
    if link is not None:
        columns = ["weights, experts", *columns[1:], "between, s"]
    cells = [
        (*_settings(way, layers), f"{way.rows} x {way.experiment.training.gradient_accumulation}", gigabytes(way.peak_bytes),
         gigabytes(way.host_bytes), _between(seconds[id(way)]), way.seconds, way.bus_seconds,
         *(() if link is None else (way.link_seconds,)))
        for way in fitting
    ]  # fmt: skip
    notes = [f"does not fit: experts {', '.join(_settings(way, layers))}: {way.refused}" for way in several if way.refused is not None]
    lower = any("adapter.rank" in way.changes for way in fitting)
    notes.append(f"fastest first{', lower ranks last: they train another adapter' if lower else ''}")
    notes.append("bytes by the closed form (`moejax estimate memory` compiles); at least: a floor by data sheet and bus, for the order")
    notes += dict.fromkeys(f"{gpu}: {told.basis}" for told in seconds.values())
    if link is not None:
        rate = f"{link.name}, {link.rate / 1e9:.4g} GB/s that a card receives (--link)"
        notes.append(f"rows are of all devices, GB of each; between: over {rate}, nothing of it hidden behind work")
        notes.append("weights = experts: as if every device's experts had as many tokens; with the busiest all wait (docs/several_gpus.md)")
    notes += besides
    if fitting:
        mesh = fitting[0].experiment.mesh
        changes = ({} if mesh is None or mesh == experiment.mesh else {"mesh.devices": mesh.devices}) | dict(fitting[0].changes)
        left = [text for text in given if text.partition("=")[0] not in changes]
        notes.append(" ".join(["first:", "moejax train", shlex.join(left), written(changes)]).rstrip())
    show_table(f"{experiment.name} on {gpu}: {counted(total, 'row')} of {first.row_tokens} tokens a step", columns, cells, notes)


def _between(told: own.Estimate) -> str:
    low, high = told.interval
    return f"{told.seconds:.3g} ({low:.3g} to {high:.3g})"


def _settings(way: Way, layers: int) -> tuple[str, ...]:
    """Where experts lie, by which optimizer, rank and mode."""
    e = way.experiment
    rank = "all weights" if e.adapter is None else f"rank {e.adapter.rank}".replace("'", "")
    mode = e.training.remat + (", layer by layer" if e.training.together > 1 else "")
    here = e.placement.on_device(layers)
    weights = "" if e.mesh is None else f"{e.mesh.weights}, "
    where = {layers: "on the device", 0: "in the host"}.get(here, f"{here} of {layers} layers on the device")
    return weights + where, e.training.optimizer, rank, mode
