"""`--dry-run`: what a run would train, store and send: shapes, and data and headers of weights that lie on this machine. No numbers of
weights, no network."""

from __future__ import annotations

import math
import os
from pathlib import Path

from moejax.config import Experiment
from moejax.data import pipeline
from moejax.data.places import is_file, is_here
from moejax.estimator import memory
from moejax.estimator.sizes import Stored, model_folder, optimizer_bytes, stored
from moejax.estimator.units import counted, gigabytes
from moejax.files import meant
from moejax.hub.model import architecture, continue_adapter, model_arguments
from moejax.hub.stored import weight_files
from moejax.hub.weights import check_files
from moejax.models.build import build
from moejax.models.ops import choice
from moejax.progress import Table, say
from moejax.runs import folders, tokens
from moejax.training import experts, low_precision, preference, scoring, wandb_run
from moejax.training.optimizer import kept_wide
from moejax.training.run_steps import total_steps
from moejax.training.start import read_data


def report(experiment: Experiment) -> None:
    """Tell the tables. Raises UserError for what a run would refuse."""
    wandb_run.check(experiment)
    asked = scoring.dry(experiment)
    experiment = tokens.with_rows(experiment, model_folder(experiment), fetch=False)
    folder = model_folder(experiment)
    sizes = architecture(experiment, folder)
    if folder is not None and weight_files(folder):
        check_files(build(sizes, **model_arguments(experiment)), folder)
    platform = choice.here()  # what no card can run; this machine need not have one
    experts.check_attention(experiment, sizes, platform if choice.is_tpu(platform) else "a GPU")
    groups: dict[str, list[Stored]] = {}
    for w in stored(experiment, sizes):
        kind = sizes.kind_of((*w.module, w.name)) + (" LoRA" if w.name in ("a", "b") else "")
        groups.setdefault(f"rows of tokens: {kind}" if w.name == "rows" else kind, []).append(w)
    begun = experiment.adapter and experiment.adapter.init_from
    if begun and Path(begun).is_dir():
        # refuses one that does not fit
        continue_adapter(experiment, build(sizes, **model_arguments(experiment)), experiment.model.source)
    rows = []
    for name, ws in groups.items():
        size, nbytes = sum(w.size for w in ws), sum(w.bytes for w in ws)
        storage, trains = max(ws, key=lambda w: w.bytes).storage, "yes" if ws[0].trained else "frozen"
        rows.append((name, f"{size:,}", storage, f"{gigabytes(nbytes)}", trains))
    (base, active), buffers = sizes.parameters, sum(math.prod(sizes.weights[path]) for path in sizes.buffers)
    every = [w for ws in groups.values() for w in ws]
    trained = tuple(w for w in every if w.trained)
    weights, gradients = sum(w.bytes for w in every), sum(w.bytes for w in trained)
    state_in = "8 bits" if experiment.training.optimizer == "adamw_8bit" else experiment.training.moments_dtype or trained[0].storage
    optimizer = optimizer_bytes(experiment.training, trained)
    sums = [
        ("base model", f"{base:,}", "", "", ""),
        *([("and biases of a choice", f"{buffers:,}", "", "", "")] if buffers else []),
        (f"active per token, k = {sizes.experts_per_token}", f"{active:,}", "", "", ""),
        ("trained", f"{sum(w.size for w in trained):,}", trained[0].storage, f"{gigabytes(gradients)}", ""),
        ("weights in memory", "", "", f"{gigabytes(weights)}", ""),
        (f"{experiment.training.optimizer} state", "", state_in, f"{gigabytes(optimizer)}", ""),
        ("gradients", "", trained[0].storage, f"{gigabytes(gradients)}", ""),
    ]
    total = ("before activations", "", "", f"{gigabytes(weights + optimizer + gradients)}", "")
    columns = ("group", "parameters", "stored as", "GB", "trained")
    say(Table([*rows, None, *sums, None, total], columns, (1, 3), f"parameters of {experiment.name}"))
    say(*memory.cards(experiment, sizes), *kept_wide(experiment, sizes), *low_precision.warnings(experiment))
    away = not_here(experiment)
    told: list[str] = []
    steps: int | None = None
    needed = ("data.source", "data.eval_source", "tokenizer" if experiment.tokenizer else "model.source")
    away_first = (f"{key} = {name}" for begin in needed for key, name in away.items() if key.partition("[")[0] == begin)
    unread = None if experiment.data.source is None else next(away_first, None)
    if unread is None:
        # Problems of an eval: section that are not here are told of below.
        there = experiment.eval is not None and is_here(experiment.eval.data)
        known = experiment if there else experiment.model_copy(update={"eval": None})
        steps = total_steps(experiment, read_data(known, sizes, model_folder(experiment))[2])
    else:
        experiment, told = _untokenized(experiment, unread)
    say(_schedule(experiment, steps))
    say(*preference.told(experiment))
    say(*told, *asked, *missing(experiment), *_place(experiment))


def _untokenized(experiment: Experiment, elsewhere: str) -> tuple[Experiment, list[str]]:
    """Where `elsewhere` (key = value) is not on this machine: the experiment with the number of records in its data's file, and a line
    about them. Raises UserError for what a run would refuse of them before it tokenizes."""
    why = f"a dry run does not use the network: {elsewhere} is no file or folder here"
    data = experiment.data
    if data.eval_source is not None and not is_here(data.eval_source):
        data = data.model_copy(update={"eval_source": None})
    if data.source is None or not all(is_here(one.source) for one in data.sources):
        return experiment, [] if any(elsewhere in line for line in missing(experiment)) else [f"data not read, {why}"]
    read = pipeline.read(data, pairs=experiment.preference is not None)
    records, held_out = (sum(one.count for one in sources) for sources in read)
    known = experiment.data.model_copy(update={"records": records + data.holdout})
    beside = f" and {held_out:,} to hold out" if held_out else ""
    told = f"data: {records:,} records to train on{beside}, all with text; their number of tokens is unknown, {why}"
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


def not_here(experiment: Experiment) -> dict[str, str]:
    """Key -> value, of what the config names and no file or folder here is."""
    adapter = experiment.adapter
    several = isinstance(experiment.data.source, tuple)
    sources = {f"data.source[{n}]" if several else "data.source": one.source for n, one in enumerate(experiment.data.sources)}
    named = {
        **sources, "data.eval_source": experiment.data.eval_source, "tokenizer": experiment.tokenizer,
        "model.source": experiment.model.source, "adapter.init_from": adapter.init_from if adapter else None,
    }  # fmt: skip
    return {key: name for key, name in named.items() if name is not None and not is_here(name)}


def missing(experiment: Experiment) -> list[str]:
    """A line for each of them that a real run would stop at."""
    lost = [f"{key} = {name}{meant(Path(name))}" for key, name in not_here(experiment).items() if not may_be_elsewhere(key, name)]
    return [f"not there: {one} (looked for from {Path.cwd()}); a run would stop here" for one in lost]


def may_be_elsewhere(key: str, name: str) -> bool:
    """A URL is fetched, and what looks like owner/name may be a Hub id: neither can be checked without a network."""
    if name.startswith(("https://", "http://")):
        return True
    return not is_file(name) if key.startswith("data.") else name.count("/") == 1 and not name.startswith((".", "/"))


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
        return f"{shape}\nschedule: {epochs} of {d.records:,} records; packed, so steps follow from their lengths; {rate}"
    train = d.records - d.holdout
    of_record = 1 if experiment.preference is None else 2  # rows
    each = math.ceil(math.ceil(of_record * train / d.batch_rows) / t.gradient_accumulation)
    return (
        f"{shape}\nschedule: {epochs} of {train:,} records: {counted(each, 'step')} each, {each * (t.epochs or 1):,} in all "
        f"(fewer if records are dropped); {rate}"
    )
