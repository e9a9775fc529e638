"""`moejax estimate receipts`: list the measured steps that estimates use, of moejax and of other tools."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moejax import gpus
from moejax.commands.arguments import RECEIPTS_HELP
from moejax.commands.tables import print_json, show_table

if TYPE_CHECKING:
    from moejax.estimator.receipts import Receipt
    from moejax.gpus import GPU

def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--receipts", metavar="DIR", help=RECEIPTS_HELP)
    parser.add_argument("--tool", metavar="NAME", help="show only this software: moejax, unsloth, e4b, …")
    parser.add_argument("--forms", action="store_true", help="show every step-time model that was tried, with its errors (takes minutes)")
    parser.add_argument("--gpu-file", metavar="FILE", help="YAML file that defines more GPUs")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")


def run(options: argparse.Namespace) -> int:
    from moejax.estimator import receipts

    table = gpus.from_yaml(options.gpu_file) if options.gpu_file else gpus.GPUS
    every = receipts.with_own(options.receipts, table)
    found = [r for r in every if options.tool in (None, r.tool_name)]
    if options.forms:
        return _forms(every, table, options.json)
    differ = {m: receipts.contradictions(found, m) for m in ("step_seconds", "peak_gb_allocator")}
    if options.json:
        same = {m: [[r.id for r in group] for group in groups] for m, groups in differ.items()}
        print_json({"receipts": [r.model_dump(mode="json", exclude_none=True) for r in found], "contradictions": same})
        return 0
    notes = [f"{_of_one_recipe(group)}: {_values(group, m)}; both stay, and intervals hold both" for m in differ for group in differ[m]]
    notes.append("GB: the allocator's peak, 1e9 bytes; -: not published; sources: --json")
    columns = ("receipt", "tool", "model", "GPU", "experts in", "weights", "rank", "rows", "tokens/row", "s/step", "GB")
    show_table(f"{len(found)} receipts", columns, [_cells(r) for r in found], notes)
    return 0


def _forms(every: Sequence[Receipt], table: dict[str, GPU], as_json: bool) -> int:
    """Errors of all forms, and what the chosen one's intervals and the peaks hold."""
    from dataclasses import asdict

    import numpy as np

    from moejax.estimator.tools import fitted, forms, peak

    data = fitted.points(every, table)
    scores = [fitted.score(data, form) for form in forms.FORMS]
    inside = [low <= seconds <= high for _, seconds, (low, high) in fitted.held(data)]
    memory = float(np.median(np.abs(np.expm1(peak.peaks(every, table).left_out()))))
    if as_json:
        chosen = {"chosen": forms.FORM.name, "held": sum(inside), "of": len(inside), "memory_error": memory}
        print_json(chosen | {"forms": [asdict(score) for score in scores]})
        return 0
    cells = [(s.form + " (chosen)" * (s.form == forms.FORM.name), s.fitted, s.left_out, s.mean, s.card, s.model) for s in scores]
    columns = ("form", "fitted", "one left out", "mean of logs", "card left out", "model left out")
    notes = [
        "median of |predicted/measured - 1|; mean of logs: of |log(predicted/measured)|, one left out, by which the form was chosen",
        f"intervals of 90 %, each receipt predicted by all the others: {sum(inside)} of {len(inside)} lie within",
        f"peak memory, each by all the others: {memory:.1%} in the median",
    ]
    show_table(f"seconds of a step of {len(data)} receipts", columns, cells, notes)
    return 0


def _cells(r: Receipt) -> tuple[Any, ...]:
    rows = None if r.rows is None else f"{r.micro_batch} x {r.accumulation}"
    tokens = None if r.row_tokens_mean is None else round(r.row_tokens_mean)
    version = "" if r.tool_version is None else f" {r.tool_version}"
    return (
        r.id, r.tool_name + version, r.model, r.gpu, r.experts_in, r.weights, r.lora_rank, rows, tokens, r.step_seconds,
        None if r.peak_gb_allocator is None else float(r.peak_gb_allocator),
    )  # fmt: skip


def _of_one_recipe(group: tuple[Receipt, ...]) -> str:
    return f"one recipe, {' and '.join(r.id for r in group)}"


def _values(group: tuple[Receipt, ...], measured: str) -> str:
    unit = "s" if measured == "step_seconds" else "GB"
    return " and ".join(f"{getattr(r, measured):g} {unit}" for r in group)
