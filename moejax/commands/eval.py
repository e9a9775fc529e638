"""`moejax eval RUN --task NAME --data FILE`: measure the accuracy of a run or model, and store its answers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from moejax.commands.arguments import add_mesh, check_counts, on_mesh
from moejax.errors import UserError, out_of_memory
from moejax.runtime import prepare_jax_for

if TYPE_CHECKING:
    from moejax.config_mesh import MeshConfig
    from moejax.evaluation.evaluate import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a finished run, e.g. runs/demo, or of a model in Hub layout")
    add_mesh(parser)
    parser.add_argument(
        "--task", required=True, metavar="NAME",
        help="task: data set and scoring rule, e.g. gsm8k, problems, hellaswag-generated",
    )  # fmt: skip
    parser.add_argument(
        "--data", required=True, metavar="FILE",
        help="examples: a .json, .jsonl, .csv or .parquet file, or a `datasets` name",
    )  # fmt: skip
    parser.add_argument("--split", default=None, help="split of a `datasets` name (default: test)")
    parser.add_argument("--limit", type=int, default=None, metavar="N", help="use only the first N examples")
    parser.add_argument("--base", action="store_true", help="evaluate the base model, without the adapter")
    parser.add_argument(
        "--max-new-tokens", type=int, default=None, metavar="N",
        help="maximum length of an answer (default: set by the task)",
    )  # fmt: skip
    parser.add_argument("--rows", type=int, default=16, metavar="N", help="batch size (default: 16)")
    parser.add_argument("--out", default=None, metavar="DIR", help="output folder (default: RUN/eval/NAME, or NAME-base with --base)")


def run(options: argparse.Namespace) -> int:
    """Prints accuracy, interval and speed; writes predictions.jsonl and result.json to --out or RUN/eval/TASK (see `larger`)."""
    prepare_jax_for(options.run)
    with on_mesh(options) as mesh:
        return _run(options, mesh)


def _run(options: argparse.Namespace, mesh: MeshConfig | None) -> int:
    from rich.progress import Progress

    from moejax import processes
    from moejax.evaluation.evaluate import evaluate, prompts_of, write
    from moejax.evaluation.tasks import find
    from moejax.evaluation.tasks import load as load_examples
    from moejax.runs.open import load
    from moejax.terminal import Console

    task = find(options.task)
    new = task.max_new_tokens if options.max_new_tokens is None else options.max_new_tokens
    check_counts(options, "limit", "rows", "max_new_tokens")
    folder = Path(options.run)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: expected a finished run's, or a model's in Hub layout")
    examples = load_examples(task, options.data, options.split, options.limit)
    processes.same({"examples": examples})
    out = _out(folder, task.name, options, len(examples))
    make, sizes, tokenizer, template, ends = load(folder, options.base, mesh)
    prompts_of(tokenizer, task, examples, template, new, sizes.max_position_embeddings)  # before a large model is loaded for nothing
    try:
        if processes.is_first():
            out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}: the answers could not be kept there") from None
    model = make()
    full = out_of_memory(lambda why: f"out of memory: {why}. Lower --rows ({options.rows}) or --max-new-tokens ({new})")
    with Progress(console=Console(stderr=True), transient=True, disable=not processes.is_first()) as bars, full:
        bar = bars.add_task(task.name, total=len(examples))
        result = evaluate(
            model, tokenizer, task, examples, max_new_tokens=new, rows=options.rows, template=template, ends=ends,
            progress=lambda done, total: bars.update(bar, completed=done, total=total),
        )  # fmt: skip
    try:
        if processes.is_first():
            write(result, out)
    finally:  # a disk that is full does not cost the result
        Console().print(report(result, "base" if options.base else None), soft_wrap=True)
    Console().print(f"{out}/predictions.jsonl, result.json", soft_wrap=True)
    return 0


def _out(folder: Path, task: str, options: argparse.Namespace, count: int) -> Path:
    from moejax.evaluation.evaluate import larger

    given = options.out
    if given is None and not (folder / "config.yaml").exists():
        raise UserError(f"{folder} is not a run's folder, so nothing is written there: give --out DIR")
    out = folder / "eval" / f"{task}{'-base' if options.base else ''}" if given is None else Path(given)
    if given is None and options.limit is not None and larger(out / "result.json", "n", count):
        out = out.with_name(f"{out.name}-first-{count}")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: expected a folder, or a name that is free")
    return out


def report(result: Result, which: str | None = None) -> str:
    """The result in two lines: accuracy with its interval; the rule, and the speed."""
    name = result.task if which is None else f"{result.task} ({which})"
    ends = f"95 % interval {100 * result.low:.1f} to {100 * result.high:.1f} %"
    tokens = f"{result.generated_tokens:,} tokens generated, {result.generated_tokens / result.seconds:.1f} tokens/s"
    speed = f"{result.seconds:.1f} s with compilation, {tokens}"
    return f"{name}: {100 * result.accuracy:.1f} % right ({result.correct} of {result.n}), {ends}\nrule: {result.rule}; {speed}"
