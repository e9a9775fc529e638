"""`moejax estimate memory`: find the largest batch and break down its peak memory."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any

from moejax import config, config_data, gpus, tpus
from moejax.commands.arguments import add_config, check_counts, check_kernels, names_of, on_devices, settle_config
from moejax.commands.tables import print_json, said_once, show_table
from moejax.config import Experiment
from moejax.device import HERE, this_machine
from moejax.errors import UserError
from moejax.estimator import bus, memory, placing, slices
from moejax.estimator.sizes import architecture_of, model_folder
from moejax.estimator.units import Gigabytes, counted, gigabytes
from moejax.gpus import GPU
from moejax.models.config import Architecture
from moejax.tpus import Slice
from moejax.training import flops
from moejax.training.oracle import Oracle, oracle


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--gpu", default="A40,A100-80,H100", metavar="NAME[,NAME]",
        help=f"GPU or TPU (v5e-8) names, or `{HERE}` for this machine (default: A40,A100-80,H100)",
    )  # fmt: skip
    parser.add_argument("--gpu-file", metavar="FILE", help="YAML file that defines more GPUs")
    several = "number of GPUs; mesh.weights sets how weights are placed: whole (default), spread or experts"
    parser.add_argument("--devices", type=int, metavar="N", help=several)
    parser.add_argument("--seq-len", type=int, metavar="TOKENS", help="tokens per row (default: the config's longest)")
    parser.add_argument(
        "--rows", type=int, metavar="N",
        help="number of rows: show peak and breakdown (default: find the largest that fits)",
    )  # fmt: skip
    parser.add_argument(
        "--placements", action="store_true",
        help="also try experts and tables in host memory: what fits, and transfer time per step"
    )
    parser.add_argument("--closed-form", action="store_true", help="compute memory by formula instead of compiling (needs no extra `aot`)")
    parser.add_argument("--study", action="store_true", help="show the study's Table III next to ours on 40, 48 and 80 GB (without CONFIG)")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")


def quiet_compiler(gpus: str) -> None:
    """Before jax is imported: none of XLA's remarks about a driver that is not there, and no device but where one is asked."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if HERE not in gpus.split(","):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def run(options: argparse.Namespace) -> int:
    quiet_compiler(options.gpu)
    settle_config(options, ", or --study")
    check_counts(options, "devices", "seq_len", "rows")
    cards = gpus.from_yaml(options.gpu_file) if options.gpu_file else gpus.GPUS
    asked = dict.fromkeys(HERE if name == HERE else tpus.find(name) or gpus.find(name, cards) for name in names_of(options.gpu))
    experiment = config.load(options.config, options.overrides)
    if experiment.training.remat == "auto":  # the largest batch is that of the policy that keeps least
        experiment = config.load(options.config, [*options.overrides, "training.remat=full"])
        if not options.json:
            print("training.remat = auto: counted as full, which the largest batch needs; with room left a run recomputes less")
    from moejax.runs import tokens  # jax comes with it

    experiment = tokens.with_rows(experiment, model_folder(experiment), fetch=False)
    architecture = architecture_of(experiment)
    row_tokens = options.seq_len or experiment.data.longest_text
    if row_tokens > architecture.max_position_embeddings:
        raise UserError(f"rows of {row_tokens} tokens exceed the model's max_position_embeddings = {architecture.max_position_embeddings}")
    row_tokens = config_data.whole_row(row_tokens)
    found: list[Oracle] = []
    refused: list[str] = []
    for card in asked:
        if isinstance(card, Slice):
            on, of_modes = _on_slice(card, experiment, architecture, options)
            refused += of_modes
            gpu = card.chip
        else:
            on = [on_devices(experiment, architecture, options.devices)]
            gpu = this_machine(experiment.device.memory_fraction) if isinstance(card, str) else card
        found += [oracle(e, architecture, gpu, row_tokens, options.closed_form) for e in on]
    for peaks in found:
        check_kernels(peaks.experiment, peaks.config, [peaks.gpu])
        if options.rows is not None and options.rows % peaks.devices:
            raise UserError(f"--rows {options.rows}: of all {peaks.devices} devices together, which do not divide them")
    if options.placements:
        return show_placements(found, options)
    padded = options.seq_len is not None or experiment.data.batching != "pack"
    return show(found, cards, queries_per_row(experiment, row_tokens, padded), options, refused)


def _on_slice(
    card: Slice, experiment: Experiment, architecture: Architecture, options: argparse.Namespace
) -> tuple[list[Experiment], list[str]]:
    """The experiment on a slice by each mode, and why not by others. Raises UserError for what a TPU is not asked."""
    if options.placements:
        raise UserError(f"--placements: no rate of a TPU's link to its host is published ({card.name}): expected GPUs")
    slices.check(card, experiment, devices=options.devices)
    return slices.modes(card, experiment, architecture)


def queries_per_row(experiment: Experiment, row_tokens: int, padded: bool) -> float | None:
    """1 in a padded row; in a packed one the row over the mean query of the study's data set, where the config names it. Else None."""
    from moejax.estimator import lengths

    if padded:
        return 1.0
    dataset = PurePath(experiment.data.named).stem  # by its whole name: another's set has other lengths
    return row_tokens / lengths.of_study(dataset).mean if lengths.has_lengths(dataset) else None


def show(
    asked: Sequence[Oracle], cards: dict[str, GPU], per_row: float | None, options: argparse.Namespace, cannot: Sequence[str] = ()
) -> int:  # fmt: skip
    """Print one line a GPU, and the breakdown at the largest batch (or at --rows). UserError where not one row fits on any GPU.
    `cards`: those that may be named where one does not do; `per_row`: queries in a row; `cannot`: modes that the config cannot have."""
    lines = [_line(peaks, cards, options.rows, per_row) for peaks in asked]
    experiment, row_tokens = asked[0].experiment, asked[0].row_tokens
    problems = [str(line["problem"]) for line in lines if line["problem"]]
    refused = _said_once(problems)
    if len(problems) == len(lines):
        raise UserError("; ".join(refused))
    if options.json:
        mesh = None if experiment.mesh is None else experiment.mesh.model_dump(include={"devices", "weights", "moments"})
        print_json({"config": experiment.name, "row_tokens": row_tokens, "mesh": mesh, "gpus": lines})
        return 0
    fitting = "rows" if options.rows is not None else "largest batch, rows"
    columns = {
        "GPU": "gpu", "usable GB": "usable_gb", fitting: "rows", "queries": "queries", "peak GB": "peak_gb",
        "with one row more": "next_peak_gb", "free GB": "free_gb", "by": "by",
    }  # fmt: skip
    on_tpus = any(peaks.gpu.platform == "tpu" for peaks in asked)
    notes = [*refused, *cannot, *_what_devices_hold(asked), _what_rows_are(row_tokens, per_row)]
    if on_tpus:
        notes += ["a TPU's chip is taken whole; compiled or estimated, not run (docs/tpu.md)", *slices.precision(experiment)]
    if close := said_once((line["gpu"], line["close"].partition(":")[0]) for line in lines if line["close"]):
        notes.append(f"{'; '.join(close)}: {memory.COMPILE}")
    notes += said_once((line["gpu"], f"by the closed form, not by the compiler: {line['reason']}") for line in lines if line["reason"])
    share = f"at most {experiment.device.memory_fraction:.0%} of a GPU's memory (device.memory_fraction)"
    cells = [[line[key] for key in columns.values()] for line in lines]
    show_table(f"{experiment.name}: rows of {row_tokens} tokens, {share}", tuple(columns), cells, notes)
    names = list(dict.fromkeys(name for line in lines for name in line["parts_gb"]))
    parts = [(name, *(Gigabytes(line["parts_gb"].get(name, 0.0)) for line in lines)) for name in names]
    parts.append(("peak", *(line["peak_gb"] for line in lines)))
    notes = sorted({f"temporaries: {line['moment']}" for line in lines})
    if lines[0]["host_gb"]:
        notes.append(f"also in the host's pinned memory: {lines[0]['host_gb']} GB of weights (--placements: what the bus costs)")
    if any(line["reason"] is None for line in lines):
        notes.append("rest: what the closed form does not account for of the compiler's peak; negative where it is too high")
    heads = (f"{line['gpu']}, {counted(line['shown'], 'row')}" for line in lines)
    show_table("what the peak is made of, GB", ("part", *heads), parts, notes)
    return 0


def show_placements(asked: Sequence[Oracle], options: argparse.Namespace) -> int:
    """Print a line for each GPU and placement, with the config's rows or --rows."""
    first = asked[0]
    experiment, config_of = first.experiment, first.config
    if experiment.mesh is not None:
        raise UserError("--placements is of one device: expected no --devices, and mesh=null")
    if experiment.adapter is None:
        raise UserError("--placements: only frozen weights can lie in the host's memory, and without an adapter all are trained")
    rows = options.rows or experiment.data.batch_rows
    per_token = flops.count(config_of, experiment.adapter.lora).per_token
    products = experiment.training.gradient_accumulation * rows * first.row_tokens * per_token
    lines = [_placed(peaks, place, rows, products, options.closed_form) for peaks in asked for place in _places(peaks, rows, options)]
    if options.json:
        print_json({"config": experiment.name, "rows": rows, "row_tokens": first.row_tokens, "placements": lines})
        return 0
    columns = tuple(name.replace("_gb", " GB").replace("usable", "of") for name in lines[0])
    notes = [
        f"bus: of a step of {counted(experiment.training.gradient_accumulation, 'micro-batch', 'micro-batches')}; PCIe: 16 lanes at 80 %; "
        "own: the card's own link",
        "products: at the data sheet's rate, the least that a step takes; hidden: its own link takes no longer than that",
        *dict.fromkeys(f"by the closed form, not by the compiler: {peaks.reason}" for peaks in asked if peaks.reason),
    ]
    title = f"{experiment.name}: {counted(rows, 'row')} of {first.row_tokens} tokens"
    show_table(title, columns, [tuple(line.values()) for line in lines], notes)
    return 0


def _places(peaks: Oracle, rows: int, options: argparse.Namespace) -> Iterator[dict[str, str | int]]:
    """The placements of a GPU: with the most layers' experts on the device between all and none, where that is neither."""
    layers = peaks.config.expert_layers

    def peak_bytes(on_device: int) -> int:
        placed = peaks.experiment.changed("placement", experts=on_device if on_device < layers else "device", tables="device")
        return oracle(placed, peaks.config, peaks.gpu, peaks.row_tokens, options.closed_form).peak_bytes(rows)

    limit = memory.usable_bytes(peaks.gpu, peaks.experiment.device.memory_fraction)
    of_layer = placing.expert_bytes(peaks.experiment, peaks.config) / layers
    sure = memory.by_closed_form(limit, memory.error_on(peaks.gpu))[0] if peaks.reason else limit
    most = placing.most_layers(peak_bytes, layers, of_layer, sure)
    for experts, tables in bus.PLACEMENTS:
        yield {"experts": experts, "tables": tables}
        if experts == "device" and 0 < most < layers:
            yield {"experts": most, "tables": "device"}


def _placed(peaks: Oracle, place: dict[str, str | int], rows: int, products: float, closed_form: bool) -> dict[str, Any]:
    """What the table has of a GPU and a placement. products: FLOPs of a step."""
    placed = peaks.experiment.changed("placement", **place)
    there = oracle(placed, peaks.config, peaks.gpu, peaks.row_tokens, closed_form)
    limit = memory.usable_bytes(peaks.gpu, placed.device.memory_fraction)
    sure, possible = memory.by_closed_form(limit, memory.error_on(peaks.gpu)) if there.reason else (limit, limit)
    peak, moved = there.peak_bytes(rows), bus.step_bytes(placed, peaks.config, rows, peaks.row_tokens)
    least, layers = products / peaks.gpu.rate(placed.training.compute_dtype), peaks.config.expert_layers
    split = isinstance(place["experts"], int)
    # In the layers whose experts are on the device nothing is fetched that could hide.
    behind = least * (1 - placed.placement.on_device(layers) / layers) if split else least
    experts = f"{place['experts']} of {layers} layers" if split else place["experts"]
    return {
        "gpu": peaks.gpu.name, "experts": experts, "tables": place["tables"],
        "device_gb": gigabytes(peak), "usable_gb": gigabytes(limit), "host_gb": gigabytes(there.breakdown(rows).host),
        "fits": "yes" if peak <= sure else "compile" if peak <= possible else "no",
        "bus_gb": gigabytes(moved), **{f"PCIe {generation}, s": moved / rate for generation, rate in bus.PCIE.items()},
        "own, s": moved / bus.rate(peaks.gpu), "products, s": least,
        "hidden": "-" if not moved else "yes" if moved / bus.rate(peaks.gpu) <= behind else "no",
    }  # fmt: skip


def _said_once(refused: Sequence[str]) -> list[str]:
    """Refusals as `memory.DoesNotFit` words them; which GPUs would do is said once where that is the same of all."""
    parts = [text.rpartition("; ") for text in refused]
    return [*(head for head, _, _ in parts), parts[0][2]] if len(parts) > 1 and len({tail for *_, tail in parts}) == 1 else list(refused)


def _what_devices_hold(asked: Sequence[Oracle]) -> list[str]:
    told = []
    for mesh in (peaks.experiment.mesh for peaks in asked if peaks.experiment.mesh is not None):
        held = {"whole": "all weights", "spread": "a part of the rows of each frozen matrix", "experts": "its own experts"}[mesh.weights]
        moments = "" if mesh.moments == "whole" else ", of the optimizer's state a part"
        told.append(f"bytes are each device's, rows those of all {mesh.devices}; each holds {held} (mesh.weights={mesh.weights}){moments}")
    return list(dict.fromkeys(told))


def _what_rows_are(row_tokens: int, per_row: float | None) -> str:
    if per_row == 1:
        return f"a row is one query, padded to {row_tokens} tokens"
    if per_row is None:
        return "rows are packed: how many queries they hold depends on the data"
    return f"rows are packed: {per_row:.1f} queries each at the data set's mean length (GPT-NeoX tokens, the study's Figure 2)"


def _line(peaks: Oracle, cards: dict[str, GPU], rows: int | None, per_row: float | None) -> dict[str, Any]:
    gpu, closed, least = peaks.gpu, peaks.reason is not None, peaks.devices
    limit = memory.usable_bytes(gpu, peaks.experiment.device.memory_fraction)
    sure, possible = memory.by_closed_form(limit, memory.error_on(gpu)) if closed else (limit, limit)
    after = problem = close = None
    undecided = False
    if not gpu.bf16 and peaks.experiment.training.asks_bf16:  # before anything is compiled for it
        chosen, peak = rows or 0, peaks.breakdown(rows or least).total
        problem = _without_bf16(peaks, cards, rows or least, limit)
    else:
        if rows is None:
            found = peaks.largest(limit)
            chosen, peak, after = found.rows, found.peak or found.next_peak, found.next_peak
        else:
            chosen, peak = rows, peaks.peak_bytes(rows)
        if chosen == 0 or peak > possible:
            problem, undecided = _too_large(peaks, cards, max(least, chosen), peak), peak <= possible
        elif closed:
            close = _close(peaks, chosen, rows is not None, sure, possible)
    made = peaks.breakdown(chosen or least)
    parts = made.parts(None if closed or problem else peak)
    return {
        "gpu": peaks.named, "usable_gb": gigabytes(limit), "rows": None if undecided else chosen, "shown": chosen or least,
        "queries": None if per_row is None or undecided else int(chosen * per_row),
        "peak_gb": gigabytes(peak), "next_peak_gb": None if after is None or chosen == 0 else gigabytes(after),
        "free_gb": gigabytes(limit - peak),
        "by": "closed form" if closed else f"compiler ({peaks.misses} compiled, {peaks.hits} kept)", "reason": peaks.reason,
        "host_gb": gigabytes(made.host), "problem": problem, "close": close, "moment": made.moment, "closed_form_gb": made.total / 1e9,
        "parts_gb": {name: size / 1e9 for name, size in parts.items()},
    }  # fmt: skip


def _too_large(peaks: Oracle, cards: dict[str, GPU], rows: int, peak: float) -> str:
    """By how much, and where it would do: on GPUs that a run would not refuse."""
    experiment = peaks.experiment
    what = f"{experiment.name} with {'one row' if rows == 1 else f'{rows:,} rows'} of {peaks.row_tokens} tokens"
    if experiment.mesh is not None:
        what += f" on {peaks.devices} devices (mesh.weights = {experiment.mesh.weights}{_other_modes(peaks, rows)})"
    others = [g for g in cards.values() if g.bf16 or not experiment.training.asks_bf16]
    fraction, closed = experiment.device.memory_fraction, peaks.reason is not None
    return str(memory.too_large(what, peak, peaks.gpu, fraction, others, lambda g: peaks.breakdown(rows, g).total, closed=closed))


def _other_modes(peaks: Oracle, rows: int) -> str:
    """Which other places of the weights would do, by the closed form."""
    mesh, frozen = peaks.experiment.mesh, peaks.experiment.adapter is not None
    assert mesh is not None
    sure = memory.by_gpu(peaks.gpu, peaks.experiment.device.memory_fraction)[0]
    possible = {"spread": frozen, "experts": peaks.config.num_experts % peaks.devices == 0}
    would = []
    for weights in (name for name, may in possible.items() if may and name != mesh.weights):
        other = dataclasses.replace(peaks, experiment=peaks.experiment.changed("mesh", weights=weights))
        would += [weights] if other.breakdown(rows).total <= sure else []
    return f"; {' or '.join(would)} would do" if would else ""


def _without_bf16(peaks: Oracle, cards: dict[str, GPU], rows: int, limit: float) -> str:
    """What would run: fp32 here, if that fits, and the GPUs that have bf16 and room."""
    fp32 = peaks.breakdown(rows, float32=True).total
    here = "training.compute_dtype=float32 training.param_dtype=float32 would run"
    if fp32 > memory.by_closed_form(limit)[0]:
        here = f"in float32 {counted(rows, 'row')} would need {fp32 / 1e9:.2f} GB of its {limit / 1e9:.2f}"
    fraction = peaks.experiment.device.memory_fraction
    others = memory.roomy((g for g in cards.values() if g.bf16), fraction, lambda g: peaks.breakdown(rows, g).total)
    return f"{peaks.gpu.name} has no bf16, which the training section asks for: a run is refused there. {here}; {others}"


def _close(peaks: Oracle, rows: int, asked: bool, sure: float, possible: float) -> str | None:
    """Which rows the closed form cannot judge, its error being what it is."""
    if asked:
        return None if peaks.peak_bytes(rows) <= sure else f"{counted(rows, 'row')}: {memory.COMPILE}"
    n = peaks.devices
    most = n * memory.largest_rows(lambda each: peaks.peak_bytes(n * each), possible, max(1, rows // n)).rows
    if most == rows:
        return None
    more = f"{rows + n:,} rows" if most == rows + n else f"{rows + n:,} to {most:,} rows"
    return f"{more}: {memory.COMPILE}"
