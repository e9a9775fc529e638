"""`moejax estimate memory`: the largest batch, the peak and what it is made of."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from moejax import config, gpus
from moejax.commands.arguments import add_config, names_of, settle_config
from moejax.commands.tables import print_json, show_table
from moejax.config import Experiment
from moejax.device import HERE, this_machine
from moejax.errors import UserError
from moejax.estimator import memory
from moejax.estimator.sizes import architecture_of
from moejax.estimator.units import Gigabytes, counted, gigabytes
from moejax.gpus import GPU
from moejax.training.oracle import Oracle, oracle


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--gpu", default="A40,A100-80,H100", metavar="NAME[,NAME]", help=f"GPUs by name, or `{HERE}`: this machine")
    parser.add_argument("--gpu-file", metavar="FILE", help="your own GPUs in YAML")
    parser.add_argument("--seq-len", type=int, metavar="TOKENS", help="of a row; by default the config's longest")
    parser.add_argument("--rows", type=int, metavar="N", help="only so many rows: peak and breakdown; by default the largest that fits")
    parser.add_argument("--closed-form", action="store_true", help="do not compile: by arithmetic (also without the extra `aot`)")
    parser.add_argument("--study", action="store_true", help="the study's Table III beside ours on 40, 48 and 80 GB (without CONFIG)")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")


def quiet_compiler(gpus: str) -> None:
    """Before jax is imported: none of XLA's remarks about a driver that is not there, and no device but where one is asked."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if HERE not in gpus.split(","):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def run(options: argparse.Namespace) -> int:
    quiet_compiler(options.gpu)
    settle_config(options, ", or --study")
    for name in ("seq_len", "rows"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    experiment = config.load(options.config, options.overrides)
    if experiment.training.remat == "auto":  # the largest batch is that of the policy that keeps least
        experiment = config.load(options.config, [*options.overrides, "training.remat=full"])
        if not options.json:
            print("training.remat = auto: counted as full, which the largest batch needs; with room left a run recomputes less")
    architecture = architecture_of(experiment)
    row_tokens = options.seq_len or experiment.data.longest_text
    if row_tokens > architecture.max_position_embeddings:
        raise UserError(f"rows of {row_tokens} tokens exceed the model's max_position_embeddings = {architecture.max_position_embeddings}")
    row_tokens = config.whole_row(row_tokens)
    cards = gpus.from_yaml(options.gpu_file) if options.gpu_file else gpus.GPUS
    asked = dict.fromkeys(HERE if name == HERE else gpus.find(name, cards) for name in names_of(options.gpu))
    found = []
    for card in asked:
        gpu = this_machine(experiment.device.memory_fraction) if isinstance(card, str) else card
        found.append((gpu, oracle(experiment, architecture, gpu, row_tokens, options.closed_form)))
    padded = options.seq_len is not None or experiment.data.batching != "pack"
    return show(experiment, found, cards, rows=options.rows, padded=padded, as_json=options.json)


def queries_per_row(experiment: Experiment, row_tokens: int, padded: bool) -> float | None:
    """1 in a padded row; in a packed one the row over the mean query of the study's data set, where the config names it. Else None."""
    from moejax.estimator import lengths

    if padded:
        return 1.0
    dataset = PurePath(experiment.data.source or "").stem  # by its whole name: another's set has other lengths
    return row_tokens / lengths.of_study(dataset).mean if dataset in lengths.WITH_LENGTHS else None


def show(
    experiment: Experiment, asked: Sequence[tuple[GPU, Oracle]], cards: dict[str, GPU], *, rows: int | None, padded: bool, as_json: bool
) -> int:
    """Print one line a GPU, and the breakdown at the largest batch (or at `rows`). UserError where not one row fits on any GPU.
    `cards`: those that may be named where one does not do."""
    lines = [_line(experiment, gpu, peaks, cards, rows, padded) for gpu, peaks in asked]
    refused = [str(line["problem"]) for line in lines if line["problem"]]
    none = len(refused) == len(lines)
    refused = _said_once(refused)
    if none:
        raise UserError("; ".join(refused))
    if as_json:
        print_json({"config": experiment.name, "row_tokens": asked[0][1].row_tokens, "gpus": lines})
        return 0
    per_row = queries_per_row(experiment, asked[0][1].row_tokens, padded)
    fitting = "rows" if rows is not None else "largest batch, rows"
    columns = ("GPU", "usable GB", fitting, "queries", "peak GB", "with one row more", "free GB", "by")
    cells = [
        (line["gpu"], line["usable_gb"], line["rows"], line["queries"], line["peak_gb"], line["next_peak_gb"], line["free_gb"], line["by"])
        for line in lines
    ]
    notes = [*refused, _what_rows_are(asked[0][1].row_tokens, padded, per_row)]
    reasons: dict[str, list[str]] = {}
    close: dict[str, list[str]] = {}
    for line in lines:
        if line["close"]:
            close.setdefault(line["close"].partition(":")[0], []).append(line["gpu"])
        if line["reason"]:
            reasons.setdefault(line["reason"], []).append(line["gpu"])
    if close:
        told = [f"{', '.join(of)}: {more}" for more, of in close.items()]
        notes.append(f"{'; '.join(told)}: {memory.COMPILE}")
    notes += [f"{', '.join(of)}: by the closed form, not by the compiler: {reason}" for reason, of in reasons.items()]
    show_table(f"{experiment.name}: rows of {asked[0][1].row_tokens} tokens, {_share(experiment)}", columns, cells, notes)
    shown = [line for line in lines if line["parts_gb"]]
    names = list(dict.fromkeys(name for line in shown for name in line["parts_gb"]))
    parts = [(name, *(Gigabytes(line["parts_gb"].get(name, 0.0)) for line in shown)) for name in names]
    parts.append(("peak", *(line["peak_gb"] for line in shown)))
    moments = sorted({f"temporaries: {line['moment']}" for line in shown})
    rest = "rest: what the closed form does not account for of the compiler's peak; negative where it is too high"
    notes = [*moments, *([rest] if any(line["reason"] is None for line in shown) else [])]
    heads = (f"{line['gpu']}, {counted(line['shown'], 'row')}" for line in shown)
    show_table("what the peak is made of, GB", ("part", *heads), parts, notes)
    return 0


def _said_once(refused: Sequence[str]) -> list[str]:
    """Refusals as `memory.DoesNotFit` words them; which GPUs would do is said once where that is the same of all."""
    parts = [text.rpartition("; ") for text in refused]
    return [*(head for head, _, _ in parts), parts[0][2]] if len(parts) > 1 and len({tail for *_, tail in parts}) == 1 else list(refused)


def _share(experiment: Experiment) -> str:
    return f"at most {experiment.device.memory_fraction:.0%} of a GPU's memory (device.memory_fraction)"


def _what_rows_are(row_tokens: int, padded: bool, per_row: float | None) -> str:
    if padded:
        return f"a row is one query, padded to {row_tokens} tokens"
    if per_row is None:
        return "rows are packed: how many queries they hold depends on the data"
    return f"rows are packed: {per_row:.1f} queries each at the data set's mean length (GPT-NeoX tokens, the study's Figure 2)"


def _line(experiment: Experiment, gpu: GPU, peaks: Oracle, cards: dict[str, GPU], rows: int | None, padded: bool) -> dict[str, Any]:
    fraction, closed = experiment.device.memory_fraction, peaks.reason is not None
    limit = memory.usable_bytes(gpu, fraction)
    problem = close = None
    if not gpu.bf16 and experiment.training.asks_bf16:  # before anything is compiled for it
        chosen, peak, after = rows or 0, peaks.breakdown(rows or 1).total, None
        problem = _without_bf16(experiment, gpu, peaks, cards, rows or 1, limit)
    elif rows is None:
        found = peaks.largest(limit)
        chosen, peak, after = found.rows, found.peak or found.next_peak, found.next_peak
    else:
        chosen, peak, after = rows, peaks.peak_bytes(rows), None
    sure, possible = memory.by_closed_form(limit) if closed else (limit, limit)
    if problem is None and (chosen == 0 or peak > possible):
        problem = _too_large(experiment, gpu, peaks, cards, max(1, chosen), peak)
    elif problem is None and closed:
        close = _close(peaks, chosen, rows is not None, sure, possible)
    shown = chosen or 1
    made = peaks.breakdown(shown)
    per_row = queries_per_row(experiment, peaks.row_tokens, padded)
    parts = made.parts(None if closed or problem else peak)
    by = "closed form" if closed else f"compiler ({peaks.misses} compiled, {peaks.hits} kept)"
    return {
        "gpu": gpu.name, "usable_gb": gigabytes(limit), "rows": chosen, "shown": shown,
        "queries": None if per_row is None else int(chosen * per_row),
        "peak_gb": gigabytes(peak), "next_peak_gb": None if after is None or chosen == 0 else gigabytes(after),
        "free_gb": gigabytes(limit - peak),
        "by": by, "reason": peaks.reason, "problem": problem, "close": close, "moment": made.moment, "closed_form_gb": made.total / 1e9,
        "parts_gb": {name: size / 1e9 for name, size in parts.items()},
    }  # fmt: skip


def _too_large(experiment: Experiment, gpu: GPU, peaks: Oracle, cards: dict[str, GPU], rows: int, peak: float) -> str:
    """By how much, and where it would do: on GPUs that a run would not refuse."""
    what = f"{experiment.name} with {'one row' if rows == 1 else f'{rows:,} rows'} of {peaks.row_tokens} tokens"
    others = [g for g in cards.values() if g.bf16 or not experiment.training.asks_bf16]
    fraction, closed = experiment.device.memory_fraction, peaks.reason is not None
    return str(memory.too_large(what, peak, gpu, fraction, others, lambda g: peaks.breakdown(rows, g).total, closed=closed))


def _without_bf16(experiment: Experiment, gpu: GPU, peaks: Oracle, cards: dict[str, GPU], rows: int, limit: float) -> str:
    """What would run: fp32 here, if that fits, and the GPUs that have bf16 and room."""
    fraction, fp32 = experiment.device.memory_fraction, peaks.breakdown(rows, float32=True).total
    here = "training.compute_dtype=float32 training.param_dtype=float32 would run"
    if fp32 > memory.by_closed_form(limit)[0]:
        here = f"in float32 {counted(rows, 'row')} would need {fp32 / 1e9:.2f} GB of its {limit / 1e9:.2f}"
    sure = {g: memory.by_closed_form(memory.usable_bytes(g, fraction))[0] for g in cards.values() if g.bf16}
    others = memory.would_do(g for g, most in sure.items() if peaks.breakdown(rows, g).total <= most)
    return f"{gpu.name} has no bf16, which the training section asks for: a run is refused there. {here}; {others}"


def _close(peaks: Oracle, rows: int, asked: bool, sure: float, possible: float) -> str | None:
    """Which rows the closed form cannot judge, its error being what it is."""
    if asked:
        return None if peaks.peak_bytes(rows) <= sure else f"{counted(rows, 'row')}: {memory.COMPILE}"
    most = memory.largest_rows(peaks.peak_bytes, possible, rows).rows
    if most == rows:
        return None
    more = f"{rows + 1:,} rows" if most == rows + 1 else f"{rows + 1:,} to {most:,} rows"
    return f"{more}: {memory.COMPILE}"
