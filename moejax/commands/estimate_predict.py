"""`moejax estimate predict`: predict throughput, hours and dollars. `estimate plan` shares its arguments and tables."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moejax import gpus, tpus
from moejax.commands.arguments import RECEIPTS_HELP, add_config, add_old, check_counts, devices_of, names_of, settle_config
from moejax.commands.tables import print_json, said_once, show_table
from moejax.device import HERE, this_machine_timed
from moejax.errors import UserError
from moejax.estimator import coefficients, lengths, plan, prices, published, roofline, room
from moejax.estimator.coefficients import Entry
from moejax.estimator.job import Job
from moejax.estimator.plan import Asked, Prediction
from moejax.estimator.prices import Price
from moejax.estimator.room import Room
from moejax.estimator.units import counted
from moejax.gpus import GPU

MEMORY = "memory model that limits the batch: equation-1, the study's (default with its coefficients), or closed-form (with --coefficients)"
EPOCHS, EXPERTS_PER_TOKEN = 10, 2  # the study's, where a command does not say
MODELS = {"mixtral": "mixtral", "mixtral-8x7b": "mixtral", "blackmamba": "blackmamba", "blackmamba-2.8b": "blackmamba"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add_job_arguments(parser)
    parser.add_argument(
        "--gpu", required=True, metavar="NAME[,NAME]",
        help=f"GPU or TPU (v5e-8) names, e.g. A40,A100-80,H100, or `{HERE}` for this machine",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    if not of_the_study(options):
        from moejax.commands import estimate_run  # the config's schema comes with it

        return estimate_run.predict(options)
    given = asked(options)
    found, left_out = plan.predict_all(given, options.batch)
    if options.json:
        print_json(facts(options, given) | {
            "predictions": [dataclasses.asdict(p) for p in found], "left_out": {gpu: str(why) for gpu, why in left_out.items()},
        })  # fmt: skip
    else:
        show(options, given, found)
        for why in left_out.values():
            print(f"left out: {why}")
    return 0


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    tools = ("moejax", "unsloth", "e4b", "study")
    parser.add_argument("--tool", choices=tools, help="software to predict: moejax (default), unsloth, e4b, or study (its PyTorch of 2024)")
    parser.add_argument("--tool-version", metavar="VERSION", help="version of unsloth or e4b (default: the newest with a receipt)")
    parser.add_argument("--receipts", metavar="DIR", help=RECEIPTS_HELP)
    parser.add_argument("--batch", type=int, help="queries per step (default: the fastest that fits)")
    parser.add_argument(
        "--model",
        help="model, without CONFIG: a preset (default: mixtral-8x7b), a folder with config.json, or a Hub id",
    )  # fmt: skip
    parser.add_argument("--method", help="without CONFIG: qlora (default), lora or full (default for BlackMamba)")
    parser.add_argument(
        "--experts-per-token", type=int, metavar="K",
        help="experts per token (all of them: the dense model; default: the model's; with --tool study 2)",
    )  # fmt: skip
    parser.add_argument("--dataset", help="data set of the study: commonsense_15k, math_14k, hellaswag or gsm8k")
    parser.add_argument("--records", type=int, help="number of queries; needed with --length, overrides that of a data set")
    parser.add_argument("--length", type=int, metavar="TOKENS", help="tokens per query, if all have the same length")
    parser.add_argument("--lengths", metavar="FILE", help="file with the tokens of each query: a JSON list, or one number per line")
    parser.add_argument("--epochs", type=float, help="number of epochs (default: the config's, or 1; with --tool study 10)")
    parser.add_argument("--batching", help="without CONFIG: pad_longest (default), pad_bucket, pack or fixed")
    cut = (
        "without CONFIG: row length of `fixed` and `pack`; longer queries are cut (default: only the study's data sets, at 1024). "
        "plan CONFIG --gpu: tokens per row"
    )
    parser.add_argument("--seq-len", type=int, metavar="TOKENS", help=cut)
    add_old(parser, "--row-tokens", "--seq-len", type=int, dest="seq_len")
    rounded = "with --tool study: multiple that pad_longest rounds up to (default: 8; 16 with coefficients of moejax runs)"
    parser.add_argument("--pad-multiple", type=int, metavar="TOKENS", help=rounded)
    several = "number of GPUs of each kind, e.g. 2 or 1,2,4,8; prices and queries are totals"
    parser.add_argument("--devices", metavar="N[,N]", help=several)
    parser.add_argument(
        "--weights", choices=("whole", "spread", "experts"),
        help="placement on several GPUs, as mesh.weights (default: whole)",
    )  # fmt: skip
    received = "bandwidth between GPUs (busbw of nccl-tests; default: from a table)"
    parser.add_argument("--link", type=float, metavar="GB/S", help=received)
    parser.add_argument("--overlap", type=float, metavar="SHARE", help="share of communication hidden by computation, 0 to 1 (default: 0)")
    parser.add_argument("--coefficients", metavar="FILE", help="coefficients of your own runs (`estimate fit`), instead of --tool")
    parser.add_argument("--memory", choices=("equation-1", "closed-form"), help=MEMORY)
    parser.add_argument("--gpu-file", metavar="FILE", help="YAML file that defines more GPUs")
    parser.add_argument(
        "--prices", default="2026", metavar="SET|FILE",
        help="price list: 2026 (default), study, or a CSV file with SkyPilot's columns",
    )  # fmt: skip
    parser.add_argument("--spot", action="store_true", help="use spot prices (from a file that has them)")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")


_OF_OPTIONS = {"model": "model.source, model.preset", "method": "adapter, quantization.format", "batching": "data.batching"}


def of_the_study(options: argparse.Namespace) -> bool:
    """Whether the study's way of predicting is asked for: its times, or coefficients in their place. Raises UserError for a mixture."""
    if options.config is not None and options.file is None and "=" in options.config and not Path(options.config).is_file():
        options.config, options.overrides = None, [options.config, *options.overrides]  # a change of what the options describe
    if options.config is not None or options.file is not None:
        settle_config(options)
        given = [f"--{name} ({instead})" for name, instead in _OF_OPTIONS.items() if getattr(options, name) is not None]
        if given:
            raise UserError(f"{', '.join(given)}: of a run without CONFIG: {options.config} says it; change what it says by key=value")
    options.model, options.batching = options.model or "mixtral", options.batching or "pad_longest"
    of_study = [f"--{name}" for name in ("coefficients", "memory") if getattr(options, name) is not None]
    if of_study and options.tool not in (None, "study"):
        raise UserError(f"{' and '.join(of_study)}: of the study's form of a step (docs/study.md), which --tool {options.tool} has not")
    if options.pad_multiple is not None and options.tool != "study" and not of_study:
        raise UserError(
            f"--pad-multiple {options.pad_multiple}: only with --tool study, --coefficients or --memory: moejax pads rows to a multiple of "
            "16, unsloth and e4b to the longest query"
        )
    if options.tool != "study" and not of_study:
        return False
    if options.config is not None:
        named = f"--tool {options.tool}" if options.tool else of_study[0]
        raise UserError(f"{named} takes no CONFIG ({options.config}): expected --model, --dataset and other options (--help)")
    return True


def asked(options: argparse.Namespace) -> Asked:
    """Raises UserError for what cannot be meant, and where spot prices are asked of a list without any."""
    entries = coefficients.read(options.coefficients) if options.coefficients else coefficients.study()
    job = job_of(options, entries)
    table = gpus.from_yaml(options.gpu_file) if options.gpu_file else gpus.GPUS
    offers = prices.load(options.prices, table)
    if options.spot and not any(price.spot for price in offers):
        raise UserError(f"--spot: {options.prices} has no spot price; --prices FILE with SpotPrice brings one")
    devices, link, overlap = devices_of(options)
    for n in devices:
        dataclasses.replace(job, devices=n)  # what this many cannot do is reported at once
    given = (job, gpus_of(options, table), entries, offers, table, options.spot, room_of(options))
    return Asked(*given, tuple(devices), link, overlap)


def job_of(options: argparse.Namespace, entries: Sequence[Entry]) -> Job:
    """The job; `entries`: whose software's times are predicted. Raises UserError for what cannot be meant."""
    if options.model not in MODELS:
        raise UserError(f"--model {options.model}: expected one of {', '.join(dict.fromkeys(MODELS))}")
    model = MODELS[options.model]
    method = options.method or roofline.STUDY_MODELS[model][1]
    if method not in ("qlora", "lora", "full"):
        raise UserError(f"--method {method}: expected qlora, lora or full")
    check_counts(options, "records", "length", "seq_len", "pad_multiple")
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
        length = lengths.of_study(options.dataset)
    else:
        if options.records is None:
            raise UserError("--length needs --records: how many queries of this length")
        length = lengths.constant(options.records, options.length)
    printed = sets.get(options.dataset, {}).get("queries")
    queries = options.records or printed or length.queries
    multiple, row_tokens = _multiple(entries), options.seq_len
    if row_tokens and options.batching in ("fixed", "pack") and multiple != lengths.STUDY_MULTIPLE:
        row_tokens = -(-row_tokens // multiple) * multiple  # as a run's rows are
    return Job(
        model, method, EXPERTS_PER_TOKEN if options.experts_per_token is None else options.experts_per_token, length.repeated(queries),
        queries, EPOCHS if options.epochs is None else options.epochs, options.batching,
        row_tokens, options.pad_multiple or multiple, weights=options.weights or "whole",
    )  # fmt: skip


def _multiple(entries: Sequence[Entry]) -> int:
    """What the software rounds rows up to whose times are predicted."""
    if not all(e.framework == "jax" for e in entries):
        return lengths.STUDY_MULTIPLE
    from moejax.config_data import ROW_MULTIPLE  # pydantic: a quarter of a second

    return ROW_MULTIPLE


def assumed(options: argparse.Namespace, job: Job) -> list[str]:
    """What the study's settings stand in for, because nothing was said."""
    experts = counted(job.experts_per_token, "expert")
    assumed = {"epochs": counted(job.epochs, "epoch"), "method": job.method, "experts_per_token": f"{experts} a token"}
    told = [f"{what} (--{name.replace('_', '-')})" for name, what in assumed.items() if getattr(options, name) is None]
    return [f"as in the study, because nothing else was said: {', '.join(told)}"] if told else []


def gpus_of(options: argparse.Namespace, table: dict[str, GPU]) -> list[GPU]:
    """Those of --gpu, `here` among them; all of the table without."""
    if options.gpu is None:
        return list(table.values())
    own, names = bool(options.coefficients), dict.fromkeys(names_of(options.gpu))
    if slices := [name for name in names if tpus.find(name) is not None]:
        raise UserError(f"--gpu {slices[0]}: a TPU, and these times are of GPUs: expected no --tool study, --coefficients or --memory")
    return list(dict.fromkeys(this_machine_timed(own) if name == HERE else gpus.find(name, table) for name in names))


def room_of(options: argparse.Namespace) -> Room:
    """Batch sizes are limited by the memory of the program whose times are predicted."""
    parts = options.weights not in (None, "whole")
    memory = options.memory or ("closed-form" if options.coefficients or parts else "equation-1")
    if parts and memory == "equation-1":
        raise UserError(f"--memory equation-1 is of cards that hold all weights: expected closed-form with --weights {options.weights}")
    return room.CLOSED_FORM if memory == "closed-form" else room.EQUATION_1


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


def job_title(job: Job) -> str:
    kind = f"{counted(job.experts_per_token, 'expert')} a token"
    queries, epochs = counted(job.queries, "query", "queries"), counted(job.epochs, "epoch")
    return f"{job.model} by {job.method}, {kind}: {queries} x {epochs} ({job.lengths.source})"


_JOB = ("model", "method", "experts_per_token", "queries", "epochs", "batching", "row_tokens", "weights")


def facts(options: argparse.Namespace, given: Asked) -> dict[str, Any]:
    """For --json: whose software, and the job."""
    job = given.job
    part = {key: getattr(job, key) for key in _JOB}
    part |= {"lengths": job.lengths.source, "mean_tokens": job.lengths.mean, "cut_tokens": job.cut, "told": job.told}
    return {"software": software(options, given.entries), "job": part}


def _number(value: float, decimals: int) -> str:
    """With this many decimals; below the first of them with two digits: 109.0, 0.0042."""
    return f"{value:,.{decimals}f}" if value == 0 or value >= 10**-decimals else f"{value:.2g}"


def _between(value: float, interval: tuple[float, float] | None, decimals: int, unit: str = "") -> str:
    low_high = "" if interval is None else f" ({_number(interval[0], decimals)} to {_number(interval[1], decimals)})"
    return _number(value, decimals) + unit + low_high


def hours(p: Prediction) -> str:
    return _between(p.hours, p.hours_interval, 1, " h")


def usd(p: Prediction) -> str:
    return "no price known" if p.usd is None or p.price is None else f"{_between(p.usd, p.usd_interval, 2, ' USD')} at {p.price.told}"


def sellers_ask(offers: Sequence[Price], found: Sequence[Prediction], spot: bool) -> list[str]:
    """What other sellers ask: one GPU's prices differ by more than any model's error."""
    rates = {p.gpu: [offer.usd_per_hour for offer in offers if (offer.gpu, offer.spot) == (p.gpu, spot)] for p in found}
    told = [f"{gpu} {prices.dollars(min(usd))} to {prices.dollars(max(usd))}" for gpu, usd in rates.items() if len(usd) > 1]
    return [f"USD/h that sellers ask: {', '.join(told)}"] if told else []


def show(options: argparse.Namespace, given: Asked, found: Sequence[Prediction]) -> None:
    """Whose software, the table, and what holds of all its rows."""
    job = given.job
    print(software(options, given.entries))
    rows = [
        (
            p.named if p.measured else f"{p.named} *",
            p.batch,
            round(p.tokens_per_step),
            _number(p.step_seconds, 2),
            _between(p.queries_per_second, p.queries_per_second_interval, 2),
            _between(p.hours, p.hours_interval, 1),
            "-" if p.usd is None else _between(p.usd, p.usd_interval, 2),
            "no price known" if p.price is None else p.price.told + prices.aged(p.price),
        )
        for p in found
    ]
    notes = said_once((p.named, note) for p in found for note in (p.basis, *p.notes))
    columns = ("GPU", "batch", "tokens", "s/step", "queries/s", "hours", "USD", "price")
    ending = [*job.told, *assumed(options, job)]
    if any(p.hours_interval for p in found):
        ending.append("In brackets: 95 % intervals of one measured run.")
    if not all(p.measured for p in found):
        spans = ", and the brackets span three rules of carrying" if any(p.hours_interval for p in found if not p.measured) else ""
        ending.append(f"* not measured: carried over{spans} (docs/study.md)")
    missing = prices.without((p.gpu for p in found if p.price is None), options.prices, spot=options.spot)
    show_table(job_title(job), columns, rows, [*ending, *sellers_ask(given.offers, found, options.spot), *missing, *notes])
