"""What the `eval:` section asks for, read and checked: before a run begins, and by --dry-run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moejax.config import EvalConfig, Experiment
from moejax.data.batching import Batches
from moejax.data.ends import Ends, ends_of
from moejax.data.pipeline import in_order
from moejax.data.records import blank
from moejax.data.sources import is_file, is_url, load_records
from moejax.errors import UserError
from moejax.evaluation import tasks
from moejax.evaluation.evaluate import pairs_of, prompts_of
from moejax.evaluation.tasks import Example, Task
from moejax.hub import weights


@dataclass(frozen=True)
class HeldOut:
    """The problems; `batches` of their reference answers for the loss, or None and why there is no loss."""

    settings: EvalConfig
    task: Task
    examples: list[Example]
    max_new_tokens: int
    tokenizer: Any
    template: str
    ends: Ends
    batches: Batches | None
    why_no_loss: str = ""


def prepare(experiment: Experiment, tokenizer: Any, positions: int) -> HeldOut | None:
    """None without an `eval:` section. positions: of the model.

    Raises UserError for an unknown task, a file that is not there or holds no such records, problems that are trained on too, prompts
    that are too long, and metric = loss where there is none.
    """
    e = experiment.eval
    if e is None:
        return None
    if tokenizer is None:
        raise UserError("eval asks questions, but data.source is null: a model that trains on random tokens answers nothing. Remove eval")
    task, examples = _read(experiment, e)
    _refuse_overlap(experiment, e, examples)
    template = experiment.data.template
    new = e.max_new_tokens or task.max_new_tokens
    try:
        if task.method == "generated":
            prompts_of(tokenizer, task, examples, template, new, positions)
        else:
            pairs_of(tokenizer, task, examples, positions)
    except UserError as error:
        raise UserError(f"eval.data = {e.data}, eval.max_new_tokens = {new}: {error}") from None
    batches, why = None, ""
    if template == "text":
        why = "data.template = text knows no answers apart from their questions"
    elif any(blank(example.record["output"]) for example in examples):
        why = f"{e.data} holds problems without an `output`, the text of the right answer"
    else:
        batches = in_order(experiment.data, [example.record for example in examples], tokenizer, experiment.seed, e.data)
    if why and e.metric == "loss":
        raise UserError(f"eval.metric = loss, but there is no loss: {why}. Choose eval.metric=accuracy, or other data")
    source = experiment.model.source
    ends = ends_of(tokenizer, template, None if source is None else weights.resolve(source, experiment.model.revision, weights=False))
    return HeldOut(e, task, examples, new, tokenizer, template, ends, batches, why)


def dry(experiment: Experiment) -> list[str]:
    """What `eval:` will do, in lines, as far as local files tell. Raises UserError as `prepare` does, but for what needs a tokenizer."""
    e = experiment.eval
    if e is None:
        return []
    task = tasks.find(e.task)
    when = ["at step 0", *(["each epoch"] if e.each_epoch else []), *([f"every {e.every_steps} steps"] if e.every_steps else [])]
    best = f"; best/ by {e.metric}" if experiment.checkpoint.best else ""
    lines = [f"eval: {task.name} ({task.rule}) {', '.join(when)} and at the end{best}"]
    if not _local(e.data):
        return [*lines, f"eval.data = {e.data} is no local file: not read by a dry run"]
    if not Path(e.data).is_file():
        return [*lines, f"not there: eval.data = {e.data} (looked for from {Path.cwd()}); a run would stop here"]
    task, examples = _read(experiment, e)
    lines.append(f"eval.data: {len(examples):,} problems of {e.data}")
    source = experiment.data.source
    if source is not None and _local(source) and Path(source).is_file():
        _refuse_overlap(experiment, e, examples)
    else:
        lines.append(f"data.source = {source} was not read: whether held-out problems are in it is not known")
    return lines


def _local(name: str) -> bool:
    return is_file(name) and not is_url(name)


def _read(experiment: Experiment, e: EvalConfig) -> tuple[Task, list[Example]]:
    task = tasks.find(e.task)
    try:
        return task, tasks.load(task, e.data, e.split, e.limit)
    except UserError as error:
        raise UserError(f"eval.data: {error}") from None


def _refuse_overlap(experiment: Experiment, e: EvalConfig, examples: list[Example]) -> None:
    """The same question, whatever its white space, in both files (the records of data.holdout are not trained on)."""
    data = experiment.data
    if e.allow_overlap:
        return
    records = load_records(data)
    trained = records[: len(records) - data.holdout]
    if data.template == "text":
        text = "\n".join(_plain(record["text"]) for record in trained)
        both = [i for i, example in enumerate(examples) if _question(example.record) in text]
    else:
        seen = {_question(record) for record in trained}
        both = [i for i, example in enumerate(examples) if _question(example.record) in seen]
    if both:
        files = [Path(e.data), Path(str(data.source))]
        same = " (it is the same file)" if all(f.exists() for f in files) and files[0].samefile(files[1]) else ""
        raise UserError(
            f"eval.data = {e.data}{same}: {len(both)} of its {len(examples)} problems are trained on (in {data.source}), first record "
            f"{both[0]}: right answers to them show what was remembered. Hold other problems out, or set eval.allow_overlap=true"
        )


def _question(record: dict[str, Any]) -> str:
    return _plain(f"{record['instruction']} {record['input']}")


def _plain(text: str) -> str:
    return " ".join(text.split())
