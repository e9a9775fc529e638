"""What a command line asks `predict` and `plan` for: the job, the GPUs, prices, whose memory and whose software. Imported lazily: numbers
come with what needs them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moejax.device import HERE, this_machine_timed
from moejax.errors import UserError
from moejax.estimator.units import counted

if TYPE_CHECKING:
    from moejax.estimator.coefficients import Entry
    from moejax.estimator.job import Job
    from moejax.estimator.prices import Price
    from moejax.estimator.room import Room
    from moejax.gpus import GPU

EPOCHS, EXPERTS_PER_TOKEN = 10, 2  # the study's, where a command does not say
MODELS = {"mixtral": "mixtral", "mixtral-8x7b": "mixtral", "blackmamba": "blackmamba", "blackmamba-2.8b": "blackmamba"}


def names_of(gpus: str) -> list[str]:
    """The names in --gpu. Raises UserError where there is none."""
    names = [name.strip() for name in gpus.split(",") if name.strip()]
    if not names:
        raise UserError(f"--gpu {gpus!r}: expected names of GPUs, e.g. A40,H100")
    return names


def job_of(options: argparse.Namespace, entries: Sequence[Entry]) -> Job:
    """The job; `entries`: whose software's times are predicted. Raises UserError for what cannot be meant."""
    from moejax.estimator import job, lengths, published, roofline

    if options.model not in MODELS:
        raise UserError(f"--model {options.model}: expected one of {', '.join(dict.fromkeys(MODELS))}")
    model = MODELS[options.model]
    method = options.method or roofline.STUDY_MODELS[model][1]
    if method not in ("qlora", "lora", "full"):
        raise UserError(f"--method {method}: expected qlora, lora or full")
    for name in ("records", "length", "row_tokens", "pad_multiple"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    given = [name for name in ("dataset", "length", "lengths") if getattr(options, name) is not None]
    if len(given) != 1:
        both = f" ({' and '.join(f'--{name}' for name in given)} were given)" if given else ""
        raise UserError(f"which data? Give one of --dataset NAME, --records N --length TOKENS, or --lengths FILE{both}")
    sets = published.read("lengths.json")
    if options.lengths:
        length = lengths.from_file(options.lengths)
    elif options.dataset:
        if options.dataset not in sets:
            raise UserError(f"--dataset {options.dataset}: expected one of {', '.join(sets)}")
        length = lengths.of_dataset(options.dataset)
    else:
        if options.records is None:
            raise UserError("--length needs --records: how many queries of this length")
        length = lengths.constant(options.records, options.length)
    printed = sets.get(options.dataset, {}).get("queries")
    queries = options.records or printed or length.queries
    multiple, row_tokens = _multiple(entries), options.row_tokens
    if row_tokens and options.batching in ("fixed", "pack") and multiple != lengths.STUDY_MULTIPLE:
        row_tokens = -(-row_tokens // multiple) * multiple  # as a run's rows are
    return job.Job(
        model, method, EXPERTS_PER_TOKEN if options.experts_per_token is None else options.experts_per_token, length.repeated(queries),
        queries, EPOCHS if options.epochs is None else options.epochs, options.batching,
        row_tokens, options.pad_multiple or multiple,
    )  # fmt: skip


def _multiple(entries: Sequence[Entry]) -> int:
    """What the software rounds rows up to whose times are predicted."""
    from moejax.estimator import lengths

    if not all(e.framework == "jax" for e in entries):
        return lengths.STUDY_MULTIPLE
    from moejax.config import ROW_MULTIPLE

    return ROW_MULTIPLE


def assumed(options: argparse.Namespace, job: Job) -> list[str]:
    """What the study's settings stand in for, because nothing was said."""
    experts = counted(job.experts_per_token, "expert")
    assumed = {"epochs": counted(job.epochs, "epoch"), "method": job.method, "experts_per_token": f"{experts} a token"}
    told = [f"{what} (--{name.replace('_', '-')})" for name, what in assumed.items() if getattr(options, name) is None]
    return [f"as in the study, because nothing else was said: {', '.join(told)}"] if told else []


def gpu_table(options: argparse.Namespace) -> dict[str, GPU]:
    """The table, with the GPUs of --gpu-file."""
    from moejax import gpus

    return gpus.from_yaml(options.gpu_file) if options.gpu_file else gpus.GPUS


def gpus_of(options: argparse.Namespace, table: dict[str, GPU]) -> list[GPU]:
    """Those of --gpu, `here` among them; all of the table without."""
    from moejax import gpus

    if options.gpu is None:
        return list(table.values())
    found = []
    for name in dict.fromkeys(names_of(options.gpu)):
        if name == HERE:
            found.append(this_machine_timed(bool(options.coefficients)))
        else:
            found.append(gpus.find(name, table))
    return list(dict.fromkeys(found))


def offers_of(options: argparse.Namespace, table: dict[str, GPU]) -> tuple[Price, ...]:
    """The prices. Raises UserError where spot prices are asked of a list without any."""
    from moejax.estimator import prices

    offers = prices.load(options.prices, table)
    if options.spot and not any(price.spot for price in offers):
        raise UserError(f"--spot: {options.prices} has no spot price; --prices FILE with SpotPrice brings one")
    return offers


def room_of(options: argparse.Namespace) -> Room:
    """Batch sizes are limited by the memory of the program whose times are predicted."""
    from moejax.estimator import room

    asked = options.memory or ("closed-form" if options.coefficients else "equation-1")
    return room.closed_form_room() if asked == "closed-form" else room.EQUATION_1


def software(options: argparse.Namespace, entries: Sequence[Entry]) -> str:
    """Whose steps the times are of: the first line that is printed."""
    if not options.coefficients:
        return (
            "Times are those of PyTorch in 2024 as the study measured them on its GPUs, not this project's "
            "(moejax profile, moejax estimate fit and --coefficients FILE bring your own)"
        )
    names = {"jax": "this project (JAX)", "pytorch": "PyTorch", None: "software that the file does not name"}
    known = dict.fromkeys(names.get(e.framework, e.framework) for e in entries)
    return f"Times are those of {' and '.join(map(str, known))}, as fitted in {options.coefficients}"
