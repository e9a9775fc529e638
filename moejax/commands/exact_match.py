"""`moejax exact-match RUN --data FILE`: score guessing, base and tuned model on held-out problems."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejax.commands.arguments import add_mesh, check_counts, on_mesh
from moejax.errors import UserError
from moejax.files import replace_text
from moejax.runtime import prepare_jax_for

if TYPE_CHECKING:
    from moejax.config_mesh import MeshConfig

ROWS = 64  # problems answered together


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a finished run, e.g. runs/demo")
    add_mesh(parser)
    parser.add_argument("--data", required=True, metavar="FILE", help="held-out problems (.json, .jsonl, .csv, .parquet, with `answer`)")
    parser.add_argument("--limit", type=int, default=None, metavar="N", help="use only the first N problems")


def run(options: argparse.Namespace) -> int:
    """Prints a table and writes every prompt, output and verdict to RUN/predictions.jsonl and the figures to exact_match.json."""
    prepare_jax_for(options.run)
    with on_mesh(options) as mesh:
        return _run(options, mesh)


def _run(options: argparse.Namespace, mesh: MeshConfig | None) -> int:
    import jax

    from moejax import processes
    from moejax.data.sources import load_records
    from moejax.evaluation.answers import commonest, correct, wilson_interval
    from moejax.evaluation.evaluate import evaluate, larger, prompts_of
    from moejax.evaluation.tasks import example, find
    from moejax.runs.open import load, open_run, tuned
    from moejax.terminal import Console, figures

    folder, data, limit, console = Path(options.run), options.data, options.limit, Console()
    experiment = open_run(folder)
    if experiment.model.source is None:
        raise UserError(f"{folder}: its base has random weights; only a run with model.source can be compared with its base")
    if experiment.data.template == "text":
        raise UserError(f"{folder} was trained with data.template = text, which has no questions and answers to compare")
    check_counts(options, "limit")
    records = load_records(experiment.data, data)[:limit]
    processes.same({"data": records})
    unanswered = next((i for i, r in enumerate(records) if _answer(r) is None), None)
    if unanswered is not None:
        raise UserError(f"{data}, record {unanswered} has no `answer` that is a number: exact match needs one")
    task = find("problems")
    examples = [example(task, data, i, r) for i, r in enumerate(records)]
    known = [answer for r in load_records(experiment.data, pairs=experiment.preference is not None) if (answer := _answer(r)) is not None]
    make, sizes, tokenizer, template, ends = load(folder, True, mesh)
    longest = task.max_new_tokens
    prompts_of(tokenizer, task, examples, template, longest, sizes.max_position_embeddings)
    model = make()
    right: dict[str, int] = {}
    if known:  # training data need not have answers that are numbers
        guess = commonest(known)
        right[f"always {guess}"] = sum(correct(guess, str(_answer(r))) for r in records)
    predictions: list[dict[str, Any]] = []
    for name in ("base", "tuned"):  # a fresh adapter's B is zero: the model is its base
        if name == "tuned":
            model = tuned(experiment, sizes, folder, model)
        result = evaluate(model, tokenizer, task, examples, max_new_tokens=longest, rows=ROWS, template=template, ends=ends)
        right[name] = result.correct
        predictions += [
            {"model": name, "instruction": r["instruction"], "output": p["output"], "answer": r["answer"], "correct": p["correct"]}
            for r, p in zip(records, result.predictions, strict=True)
        ]
    accuracy = {name: count / len(records) for name, count in right.items()}
    table = figures("model", "right", "accuracy", "95 % interval", title=f"exact match on {len(records)} held-out problems")
    for name, count in right.items():
        low, high = wilson_interval(count, len(records))
        table.add_row(name, f"{count}/{len(records)}", f"{100 * accuracy[name]:.1f} %", f"{100 * low:.1f} to {100 * high:.1f}")
    summary = {"data": data, "problems": len(records), "accuracy": accuracy, "backend": jax.default_backend()}
    part = f"-first-{len(records)}" if limit is not None and larger(folder / "exact_match.json", "problems", len(records)) else ""
    shown = next(p for p in predictions if p["model"] == "tuned")
    try:
        if processes.is_first():
            replace_text(folder / f"predictions{part}.jsonl", "".join(json.dumps(p) + "\n" for p in predictions))
            replace_text(folder / f"exact_match{part}.json", json.dumps(summary, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{folder}: the answers could not be kept there ({error.strerror}): free some space") from None
    finally:  # a disk that is full does not cost the result
        console.print(table)
        console.print(shown["instruction"], style="bold", soft_wrap=True)
        console.print(shown["output"], soft_wrap=True)
    return 0


def _answer(record: Any) -> str | None:
    """A record's answer, if it is a number or a text with one."""
    from moejax.evaluation.answers import final_number

    answer = record["answer"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return None
    return str(answer) if final_number(str(answer)) is not None else None
