"""`moejax exact-match RUN --data FILE`: guessing, the base and the tuned model on held-out problems."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from models.build import Model
from moejax.data.sources import Record, load_records
from moejax.data.templates import render
from moejax.data.tokenizer import load_tokenizer
from moejax.errors import UserError
from moejax.evaluation.answers import commonest, correct, wilson_interval
from moejax.evaluation.generate import generate
from moejax.evaluation.runs import open_run, tuned
from moejax.hub import weights
from moejax.training.state import architecture, create_model

MAX_NEW_TOKENS = 64


def run(run_folder: str, data: str, limit: int | None) -> int:
    """Prints a table and writes every prompt, output and verdict to RUN/predictions.jsonl and the figures to exact_match.json."""
    folder, console = Path(run_folder), Console()
    experiment = open_run(folder)
    source = experiment.model.source
    if source is None:
        raise UserError(f"{folder}: its base has random weights; only a run with model.source can be compared with its base")
    records = load_records(experiment.data, data)[:limit]
    unanswered = next((i for i, r in enumerate(records) if not r["answer"]), None)
    if unanswered is not None:
        raise UserError(f"{data}, record {unanswered} has no `answer`: exact match needs one")
    model_folder = weights.resolve(source, experiment.model.revision)
    tokenizer = load_tokenizer(experiment.tokenizer or str(model_folder), experiment.added_tokens)
    sizes = architecture(experiment, model_folder)
    model = create_model(experiment, sizes, model_folder)
    guess = commonest([r["answer"] for r in load_records(experiment.data)])
    rows: list[tuple[str, list[bool], float]] = [(f"always {guess}", [correct(guess, r["answer"]) for r in records], 0.0)]
    predictions: list[dict[str, Any]] = []
    for name in ("base", "tuned"):  # a fresh adapter's B is zero: the model is its base
        if name == "tuned":
            model = tuned(experiment, sizes, folder, model)
        verdicts, outputs, seconds = answer_all(model, tokenizer, experiment.data.template, records)
        rows.append((name, verdicts, seconds))
        predictions += [
            {"model": name, "instruction": r["instruction"], "output": o, "answer": r["answer"], "correct": v}
            for r, o, v in zip(records, outputs, verdicts, strict=True)
        ]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(p) + "\n" for p in predictions), encoding="utf-8")
    accuracy = {name: sum(verdicts) / len(verdicts) for name, verdicts, _ in rows}
    result = {"data": data, "problems": len(records), "accuracy": accuracy, "backend": jax.default_backend()}
    (folder / "exact_match.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    table = Table(title=f"exact match on {len(records)} held-out problems", title_justify="left")
    for column in ("model", "right", "accuracy", "95 % interval"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, verdicts, _ in rows:
        share, n = sum(verdicts) / len(verdicts), len(verdicts)
        low, high = wilson_interval(sum(verdicts), n)
        table.add_row(name, f"{sum(verdicts)}/{n}", f"{100 * share:.1f} %", f"{100 * low:.1f} to {100 * high:.1f}")
    console.print(table)
    example = next(p for p in predictions if p["model"] == "tuned")
    console.print(f"[bold]{example['instruction']}[/bold]\n{example['output']}", highlight=False)
    return 0


def answer_all(model: Model, tokenizer: Any, template: str, records: list[Record]) -> tuple[list[bool], list[str], float]:
    """Greedy answers, whether each is right, and the seconds it took."""
    prompts = [tokenizer.encode(render(template, record, tokenizer)[0], add_special_tokens=False) for record in records]
    start = time.perf_counter()
    tokens = generate(model, prompts, max_new_tokens=MAX_NEW_TOKENS, end=tokenizer.eos_token_id)
    outputs = [tokenizer.decode(t, skip_special_tokens=True) for t in tokens]
    verdicts = [correct(output, record["answer"]) for output, record in zip(outputs, records, strict=True)]
    return verdicts, outputs, time.perf_counter() - start
