"""What `predict` and `plan` are asked: a run, by a config or by options, on some cards, of one software."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moejax import config, gpus, tpus
from moejax.commands.arguments import check_counts, check_kernels, devices_of, names_of, on_devices, with_experts, with_weights
from moejax.device import HERE, this_machine_timed
from moejax.errors import UserError
from moejax.estimator import lengths, links, prices, published, roofline, slices, spread, ways, workload
from moejax.estimator.memory import DoesNotFit
from moejax.estimator.sizes import architecture_of, model_folder
from moejax.estimator.tools.forecast import Forecast, Forecasts
from moejax.estimator.units import counted
from moejax.estimator.workload import Workload
from moejax.gpus import GPU
from moejax.models.config import PRESETS, Architecture

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Of a micro-batch, that are looked at where nobody says how many."""
_PACKED_AT_MOST = 8192  # queries, of lengths without their data: how rows fill does not change with more
_SHORT = {"mixtral": "mixtral-8x7b", "blackmamba": "blackmamba-2.8b"}


@dataclass(frozen=True)
class Asked:
    """A run on some cards. of_rows: the run with this many rows a micro-batch; rows: those to choose from."""

    forecasts: Forecasts
    cards: Sequence[tuple[GPU, int]]  # and how many of each
    of_rows: Callable[[int], Workload]
    rows: Sequence[int]
    offers: Sequence[prices.Price]
    price_list: str
    spot: bool
    notes: Sequence[str] = ()

    def of(self, gpu: GPU, devices: int) -> tuple[Forecast, Workload]:
        """On this many of a card, with the rows that take the fewest hours of those that fit; where not one does, this program with the
        changes of `ways` that make it fit. Raises DoesNotFit where nothing does."""
        price, found = prices.cheapest(self.offers, gpu.name, spot=self.spot, devices=devices), []
        for rows in [rows for rows in self.rows if rows % devices == 0]:
            job = self.of_rows(rows)
            job = dataclasses.replace(job, experiment=on_devices(job.experiment, job.config, devices))
            try:
                found.append((self.forecasts.of(job, gpu, price), job))
            except DoesNotFit:
                if not found:
                    return self._changed(job, gpu, price)
                break
        if not found:
            looked_at = ", ".join(map(str, self.rows))
            raise DoesNotFit(f"rows of a micro-batch ({looked_at}) do not divide among {devices} devices: --batch, or data.batch_rows")
        return min(found, key=lambda pair: pair[0].hours)

    def _changed(self, job: Workload, gpu: GPU, price: prices.Price | None) -> tuple[Forecast, Workload]:
        n = spread.count(job.experiment)
        link = None if n == 1 else self.forecasts.link or links.between(gpu, n)
        asked = ways.Asked(job.experiment, job.config, gpu, job.longest_row, link=link)
        may = self.forecasts.tool == "moejax" and (gpu.bf16 or not job.experiment.training.asks_bf16)
        fitting = (w for w in ways.ways(asked) if w.refused is None) if may else ()
        for way in fitting:
            changed = dataclasses.replace(job, experiment=way.experiment)
            with contextlib.suppress(DoesNotFit):
                return dataclasses.replace(self.forecasts.of(changed, gpu, price), changes=ways.written(way.changes)), changed
        return self.forecasts.of(job, gpu, price), job  # refused as before


def asked(options: argparse.Namespace) -> Asked:
    """Raises UserError for what cannot be meant, and for data that cannot be read."""
    from moejax.estimator import receipts

    table = gpus.from_yaml(options.gpu_file) if options.gpu_file else gpus.GPUS
    check_counts(options, "records", "length", "seq_len", "pad_multiple", "batch")
    tool = options.tool or "moejax"
    if options.tool_version is not None and tool == "moejax":
        raise UserError("--tool-version: of another tool: expected --tool unsloth or --tool e4b with it")
    if options.tool_version is not None and not options.tool_version[:1].isdigit():
        raise UserError(f"--tool-version {options.tool_version}: expected a number, as 2026.9.14 of unsloth or 0.49 of e4b")
    for card in [] if options.gpu is None else names_of(options.gpu):
        if card != HERE and tpus.find(card) is None:
            gpus.find(card, table)  # an unknown one is said before anything is read
    of_rows, rows, notes = _of_config(options) if options.config is not None else _of_options(options)
    offers = prices.load(options.prices, table)
    if options.spot and not any(price.spot for price in offers):
        raise UserError(f"--spot: {options.prices} has no spot price; --prices FILE with SpotPrice brings one")
    devices, link, overlap = devices_of(options)
    experiment = of_rows(rows[0]).experiment
    mesh = experiment.mesh
    if options.devices is None and mesh is not None and mesh.devices is not None:
        devices = [mesh.devices]
    cards: list[tuple[GPU, int]] = []
    for name in [None] if options.gpu is None else names_of(options.gpu):
        if name is not None and (tpu := tpus.find(name)) is not None:
            slices.check(tpu, experiment, tool, options.devices)
            cards.append((tpu.chip, tpu.count))
            notes = [*notes, *slices.precision(experiment)]
            continue
        own = list(table.values()) if name is None else [this_machine_timed(True) if name == HERE else gpus.find(name, table)]
        cards += itertools.product(own, devices)
    if tool == "moejax" and options.gpu is not None:
        check_kernels(experiment, of_rows(rows[0]).config, (card for card, _ in cards))
    if tool != "moejax" and devices != [1]:
        raise UserError(f"--devices: what --tool {tool} does on several cards is not known here")
    made = Forecasts(tool, receipts.with_own(options.receipts, table), table, options.tool_version, link, overlap)
    notes = [*notes, *prices.old(offers, options.prices)]
    return Asked(made, list(dict.fromkeys(cards)), of_rows, rows, offers, options.prices, options.spot, notes)


def _of_config(options: argparse.Namespace) -> tuple[Callable[[int], Workload], Sequence[int], list[str]]:
    """A config's own run: its rows, its data, unless options say of which lengths."""
    if options.seq_len is not None:
        raise UserError(f"--seq-len {options.seq_len}: {options.config} says it: data.max_length and data.row_tokens, by key=value")
    experiment = config.load(options.config, options.overrides)
    given = _lengths(options)
    sizes = architecture_of(experiment)
    experiment = experiment.with_defaults(sizes)
    if options.epochs is not None:
        experiment = experiment.changed("training", epochs=options.epochs, steps=None)
    sizes = with_experts(sizes, options.experts_per_token)
    data: dict[str, Any] = {}
    notes: list[str] = []
    fetched = experiment.model.source is not None and not _has_weights(experiment)
    if given is None:
        given, data, notes = _data(experiment)
    else:
        many, d = options.records or given.queries, experiment.data
        evaluated: int = d.holdout
        if d.batching == "pack":
            data["rows_an_epoch"], evaluated = (_packed(given, n, d.max_length, d.longest_row) for n in (many, d.holdout))
        data |= {"queries": many, "evaluated_rows": evaluated}
        notes.append(f"lengths: {given.source}, instead of the config's data")

    experiment = with_weights(experiment, options.weights)

    def of_rows(rows: int) -> Workload:
        return workload.of(experiment.changed("data", batch_rows=rows), sizes, given, **data, fetched=fetched)

    return of_rows, (options.batch or experiment.data.batch_rows,), notes


def _has_weights(experiment: config.Experiment) -> bool:
    """Whether the model is a folder with weights: of the Hub's models their small files alone may be here."""
    folder = model_folder(experiment)
    return folder is not None and any(folder.glob("*.safetensors"))


def _packed(found: lengths.Lengths, many: int, max_length: int, row_tokens: int) -> int:
    """Rows of `many` queries of these lengths, as the packer packs some of them, drawn: a query is whole in a row."""
    from moejax.data.batching import pack

    drawn = np.random.default_rng(0).permutation(np.repeat(found.tokens, found.counts))[:_PACKED_AT_MOST]
    return -(-many * len(pack(np.minimum(drawn, max_length).tolist(), row_tokens)) // len(drawn))


def _data(experiment: config.Experiment) -> tuple[lengths.Lengths, dict[str, Any], list[str]]:
    """Lengths of the config's own data by its tokenizer, and the rows that they make."""
    d, t = experiment.data, experiment.training
    if d.source is None:
        records = d.batch_rows * t.gradient_accumulation * (t.steps or 1)
        return lengths.constant(records, d.row_tokens), {}, ["lengths: random tokens, rows full"]
    from moejax.commands.data import read_data

    try:
        dataset, _ = read_data(experiment)
    except UserError as error:
        raise UserError(f"{error}\nWithout the data: --records N --length TOKENS, or --lengths FILE (tokens of each query)") from None
    tokens, counts = np.unique(np.asarray(dataset.train.lengths, np.int64), return_counts=True)
    found = lengths.Lengths(tokens, counts, f"{d.named}, {counted(int(counts.sum()), 'query', 'queries')}")
    evaluated = 0 if dataset.evaluation is None else dataset.evaluation.rows()
    rows = {"rows_an_epoch": dataset.train.rows(), "evaluated_rows": evaluated}
    return found, rows, [f"lengths: {found.source}, counted with the model's tokenizer"]


def _lengths(options: argparse.Namespace) -> lengths.Lengths | None:
    given = [name for name in ("dataset", "length", "lengths") if getattr(options, name) is not None]
    if len(given) > 1:
        raise UserError(f"which data? {' and '.join(f'--{name}' for name in given)} were given: expected one")
    if options.lengths:
        return lengths.from_file(options.lengths)
    if options.dataset:
        sets = published.read("lengths.json")
        if options.dataset not in sets:
            raise UserError(f"--dataset {options.dataset}: expected one of {', '.join(sets)}")
        return lengths.of_study(options.dataset)
    if options.length:
        if options.records is None:
            raise UserError("--length needs --records: how many queries of this length")
        return lengths.constant(options.records, options.length)
    return None


def _of_options(options: argparse.Namespace) -> tuple[Callable[[int], Workload], Sequence[int], list[str]]:
    """A run that options describe: a model by preset, folder or Hub id, and lengths."""
    found = _lengths(options)
    if found is None:
        raise UserError("which data? Give a CONFIG, or one of --dataset NAME, --records N --length TOKENS, --lengths FILE")
    name = _SHORT.get(options.model, options.model)
    model, sizes = _model(name)
    sizes = with_experts(sizes, options.experts_per_token)
    method = options.method or dict(roofline.STUDY_MODELS.values()).get(name, "qlora")
    if method not in ("qlora", "lora", "full"):
        raise UserError(f"--method {method}: expected qlora, lora or full")
    cut = min(options.seq_len or found.cut(), sizes.max_position_embeddings)
    epochs = 1 if options.epochs is None else options.epochs
    experiment = config.of(
        {
            "name": "asked", "model": model, "tokenizer": "none", "adapter": None if method == "full" else {},
            "quantization": {"format": "nf4" if method == "qlora" else "none"},
            "data": {"source": "asked", "batching": options.batching, "max_length": cut, "row_tokens": cut,
                     "buckets": [128, 256, 512, cut]},
            "training": {"epochs": 1, "compute_dtype": "bfloat16", "remat": "full", "learning_rate": 1e-4,
                         **({"param_dtype": "bfloat16"} if method == "full" else {})},
        },
        "the options", options.overrides,
    ).with_defaults(sizes)  # fmt: skip
    experiment = with_weights(experiment, options.weights)
    many = options.records or published.read("lengths.json").get(options.dataset, {}).get("queries") or found.queries

    def of_rows(rows: int) -> Workload:
        given = experiment.changed("data", batch_rows=rows)
        job = workload.of(given, sizes, found.repeated(many), queries=many, fetched=not _has_weights(experiment))
        return dataclasses.replace(job, epochs=epochs, steps=round(job.steps * epochs), other_steps=round(job.other_steps * epochs))

    notes = [f"{name} by {method}: {counted(many, 'query', 'queries')} x {counted(epochs, 'epoch')} ({found.source})"]
    rows = (options.batch,) if options.batch else tuple(rows for rows in ROWS if rows <= many)
    return of_rows, rows, notes


def _model(name: str) -> tuple[dict[str, Any], Architecture]:
    """A preset, a folder or a config.json, or a model of the Hub, of which its small files alone are fetched."""
    from moejax.documents import read_json
    from moejax.models.config import from_hub_config

    if name in PRESETS:
        return {"preset": name}, PRESETS[name]
    path = Path(name)
    if not path.exists() and name.count("/") == 1:
        from moejax.hub import snapshot

        path = snapshot.resolve(name, None, weights=False)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        near = difflib.get_close_matches(name.lower(), PRESETS, n=1)
        meant = f"did you mean {near[0]}? Expected" if near else "expected"
        raise UserError(f"--model {name}: {meant} one of {', '.join(PRESETS)}, a folder with config.json, or OWNER/NAME of the Hub")
    try:
        return {"source": str(file.parent)}, from_hub_config(read_json(file, "--model "))
    except (ValueError, KeyError) as error:
        raise UserError(f"--model {name}: {error}") from None
