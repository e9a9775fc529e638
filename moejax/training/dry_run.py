"""`--dry-run`: what a run would train, store and send: shapes, and data that lie on this machine. No weights, no network."""

from __future__ import annotations

import math
import os
from pathlib import Path

from rich.table import Table

from moejax.config import Experiment
from moejax.data import pipeline
from moejax.data.sources import is_file
from moejax.estimator import memory
from moejax.estimator.sizes import optimizer_bytes, stored
from moejax.estimator.units import counted, gigabytes
from moejax.hub.model import architecture, model_arguments
from moejax.models.build import build
from moejax.runs import folders
from moejax.terminal import Console
from moejax.training import held_out, low_precision
from moejax.training.inputs import not_local, read_data
from moejax.training.parameters import Group, groups_of
from moejax.training.run_steps import total_steps


def parameter_groups(experiment: Experiment) -> dict[str, Group]:
    """Group name -> counts of the model that this experiment builds, from an abstract model."""
    model = build(architecture(experiment, _folder(experiment)), **model_arguments(experiment))
    return groups_of(model)


def _folder(experiment: Experiment) -> Path | None:
    source = experiment.model.source
    return Path(source) if source and Path(source).is_dir() else None


def report(experiment: Experiment) -> int:
    """Print the tables. Returns exit code 0."""
    asked = held_out.dry(experiment)
    console = Console(width=110)
    groups = parameter_groups(experiment)
    table = Table(title=f"parameters of {experiment.name}", title_justify="left")
    for column in ("group", "parameters", "stored as", "GB", "trained"):
        table.add_column(column, justify="right" if column in ("parameters", "GB") else "left")
    for name, group in groups.items():
        state = "yes" if group.trainable else "frozen"
        table.add_row(name, f"{group.parameters:,}", group.dtype, f"{gigabytes(group.bytes)}", state)
    sizes = architecture(experiment, _folder(experiment))
    base, active = sizes.parameters
    trained = [g for g in groups.values() if g.trainable]
    weights = sum(g.bytes for g in groups.values())
    optimizer = optimizer_bytes(experiment.training.optimizer, tuple(w for w in stored(experiment, sizes) if w.trained))
    gradients = sum(g.bytes for g in trained)
    table.add_section()
    table.add_row("base model", f"{base:,}", "", "", "")
    table.add_row(f"active per token, k = {sizes.experts_per_token}", f"{active:,}", "", "", "")
    table.add_row("trained", f"{sum(g.parameters for g in trained):,}", trained[0].dtype, f"{gigabytes(gradients)}", "")
    table.add_row("weights in memory", "", "", f"{gigabytes(weights)}", "")
    table.add_row(f"{experiment.training.optimizer} state", "", trained[0].dtype, f"{gigabytes(optimizer)}", "")
    table.add_row("gradients", "", trained[0].dtype, f"{gigabytes(gradients)}", "")
    table.add_section()
    total = weights + optimizer + gradients
    table.add_row("before activations", "", "", f"{gigabytes(total)}", "")
    console.print(table)
    for line in memory.cards(experiment, sizes):
        console.print(line, soft_wrap=True)
    low_precision.warn(experiment, console)
    elsewhere = not_local(experiment, _folder(experiment))
    steps: int | None = None
    told: list[str] = []
    if elsewhere is None:
        # Problems of an eval: section that are not here are told of below.
        there = experiment.eval is not None and Path(experiment.eval.data).is_file()
        known = experiment if there else experiment.model_copy(update={"eval": None})
        steps = total_steps(experiment, read_data(known, sizes, _folder(experiment), console)[2])
    else:
        experiment, told = _untokenized(experiment, elsewhere)
    console.print(_schedule(experiment, steps))
    for line in [*told, *asked, *missing(experiment), *_place(experiment)]:
        console.print(line, soft_wrap=True)
    return 0


def _untokenized(experiment: Experiment, elsewhere: str) -> tuple[Experiment, list[str]]:
    """Where `elsewhere` (key = value) is not on this machine: the experiment with the number of records in its data's file, and a line
    about them. Raises UserError for what a run would refuse of them before it tokenizes."""
    why = f"a dry run asks no network: {elsewhere} is no file or folder here"
    data = experiment.data
    if data.eval_source is not None and not Path(data.eval_source).is_file():
        data = data.model_copy(update={"eval_source": None})
    if data.source is None or not Path(data.source).is_file():
        return experiment, [] if any(elsewhere in line for line in missing(experiment)) else [f"data not read, {why}"]
    records, held_out = pipeline.read(data)
    known = experiment.data.model_copy(update={"records": len(records) + data.holdout})
    beside = f" and {len(held_out):,} to hold out" if held_out else ""
    told = f"data: {len(records):,} records to train on{beside}, each with its texts; how many tokens they are is not known, {why}"
    return experiment.model_copy(update={"data": known}), [told]


def _place(experiment: Experiment) -> list[str]:
    """A line where the run's folder is there already, or could not be made."""
    folder = folders.folder_of(experiment).absolute()
    if folder.is_dir() and any(folder.iterdir()):
        return [f"there already: {folder}; a run would go on in it with --resume, or stop here"]
    above = next(path for path in (folder, *folder.parents) if path.exists())
    if above.is_dir() and os.access(above, os.W_OK):
        return []
    return [f"runs_dir = {experiment.runs_dir}: {above} cannot be written to; a run would stop here"]


def missing(experiment: Experiment) -> list[str]:
    """A line for each local file or folder that the config names and that is not there: a real run would stop at it."""
    data = {"data.source": experiment.data.source, "data.eval_source": experiment.data.eval_source}
    named = {key: name if name and is_file(name) else None for key, name in data.items()} | {
        "model.source": experiment.model.source,
        "adapter.init_from": experiment.adapter.init_from if experiment.adapter else None,
    }
    lines = []
    for key, name in named.items():
        # What looks like owner/name may be a Hub id, and a URL is fetched: neither can be checked without a network.
        if name is None or name.startswith(("https://", "http://")):
            continue
        hub_id = key not in data and name.count("/") == 1 and not name.startswith((".", "/"))
        if not hub_id and not Path(name).exists():
            lines.append(f"not there: {key} = {name} (looked for from {Path.cwd()}); a run would stop here")
    return lines


def _schedule(experiment: Experiment, steps: int | None) -> str:
    """steps: of the whole run, where the data were read."""
    d, t = experiment.data, experiment.training
    micro = counted(t.gradient_accumulation, "micro-batch", "micro-batches")
    shape = f"batch: {micro} of {counted(d.batch_rows, 'row')}, {d.batching}, at most {d.longest_row} tokens a row"
    rate = f"learning rate {t.learning_rate:g}, {t.schedule}, {counted(t.warmup_steps, 'warm-up step')}, clip {t.clip_norm}"
    if t.steps is not None or steps is not None:
        return f"{shape}\nschedule: {counted(t.steps or steps or 0, 'step')}; {rate}"
    epochs = counted(t.epochs or 0, "epoch")
    if d.records is None:
        return f"{shape}\nschedule: {epochs}; steps unknown before the data is read (data.records is not declared); {rate}"
    if d.batching == "pack":
        return (
            f"{shape}\nschedule: {epochs} of {d.records:,} records; packed, so steps follow from their lengths; {rate}"
        )
    train = d.records - d.holdout
    each = math.ceil(math.ceil(train / d.batch_rows) / t.gradient_accumulation)
    return (
        f"{shape}\nschedule: {epochs} of {train:,} records: {counted(each, 'step')} each, {each * (t.epochs or 1):,} in all "
        f"(fewer if records are dropped); {rate}"
    )
