"""The `eval:` section: its problems, read and checked before a run begins; right answers counted while it trains; the best model kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent
from typing import Any

from moejax.config import EvalConfig, Experiment
from moejax.data.batching import Batches
from moejax.data.ends import Ends, ends_of
from moejax.data.pipeline import in_order
from moejax.data.places import is_file, is_here, is_url
from moejax.data.records import blank
from moejax.data.sources import load_sources, parted
from moejax.errors import UserError, out_of_memory
from moejax.evaluation import tasks
from moejax.evaluation.evaluate import evaluate, prompts_of, write
from moejax.evaluation.recorded import Record, percent, recorded
from moejax.evaluation.tasks import Example, Task
from moejax.files import replace_text
from moejax.hub import weights
from moejax.models.build import Model

BEST = "best"  # the folder of the best model in a run's folder



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
    template = experiment.data.template or "mistral"
    new = e.max_new_tokens or task.max_new_tokens
    try:
        prompts_of(tokenizer, task, examples, template, new, positions)
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
    if not is_here(e.data):
        return [*lines, f"not there: eval.data = {e.data} (looked for from {Path.cwd()}); a run would stop here"]
    task, examples = _read(experiment, e)
    lines.append(f"eval.data: {len(examples):,} problems of {e.data}")
    if experiment.data.sources and all(is_here(one.source) for one in experiment.data.sources):
        _refuse_overlap(experiment, e, examples)
    else:
        lines.append(f"data.source = {experiment.data.named or None} was not read: whether held-out problems are in it is not known")
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
    sources = load_sources(data, pairs=experiment.preference is not None)
    trained = (record for source in parted(sources, data.holdout)[0] for record in source.records)
    if data.template == "text":
        text = "\n".join(_plain(record["text"]) for record in trained)
        both = [i for i, example in enumerate(examples) if _question(example.record) in text]
    else:
        seen = {text for record in trained for text in _questions(record)}
        both = [i for i, example in enumerate(examples) if _question(example.record) in seen]
    if both:
        files = [Path(name) for name in (e.data, *(one.source for one in data.sources)) if Path(name).exists()]
        same = " (it is the same file)" if any(Path(e.data).samefile(file) for file in files[1:]) and files[0] == Path(e.data) else ""
        raise UserError(
            f"eval.data = {e.data}{same}: {len(both)} of its {len(examples)} problems are trained on (in {data.named}), first record "
            f"{both[0]}: right answers to them show what was remembered. Hold other problems out, or set eval.allow_overlap=true"
        )


def _questions(record: dict[str, Any]) -> list[str]:
    """What is asked in a record; in a conversation, by every message of the user."""
    talk = record.get("conversation")
    if talk is None:
        return [_question(record)]
    return [_plain(message.get("content", "")) for message in talk.messages if message["role"] == "user"]


def _question(record: dict[str, Any]) -> str:
    return _plain(f"{record['instruction']} {record['input']}")


def _plain(text: str) -> str:
    return " ".join(text.split())


class Stopped(Exception):
    """The run is to end: an evaluation is not finished for it; a resumed run makes it again."""


class Scoring:
    """The evaluations of a run. `results`: step -> what metrics.jsonl says of it, those of an earlier process included.

    steps: after which of them to evaluate (0: the untrained model). own: the folder that this process writes into, of several; None: the
    run's.
    """

    def __init__(self, held_out: HeldOut, steps: frozenset[int], folder: Path, own: Path | None = None):
        self.held_out, self.steps, self.folder, self.own = held_out, steps, folder, own or folder
        self.metric = f"eval/{held_out.settings.metric}"
        self.results = recorded(folder)
        self.samples = ""  # the first answers of the newest evaluation, as Markdown

    def due(self, step: int) -> bool:
        return step in self.steps and step not in self.results

    def measure(
        self, step: int, epoch: float, model: Model, means: Callable[[Batches], tuple[dict[str, float], float]], stopped: Callable[[], bool]
    ) -> Record | None:
        """Evaluate, keep the predictions in RUN/eval/step-N. None if `stopped()` came true meanwhile. Raises UserError without memory.

        means: ({"loss": mean cross-entropy per supervised token}, number of tokens).
        """

        def progress(done: int, count: int) -> None:
            if stopped():
                raise Stopped

        h = self.held_out
        lower = f"Lower eval.rows ({h.settings.rows}) or eval.max_new_tokens ({h.max_new_tokens})"
        try:
            with out_of_memory(lambda why: f"out of memory in the evaluation after step {step}: {why}. {lower}"):
                loss = {} if h.batches is None else {"eval/loss": means(h.batches)[0]["loss"]}
                result = evaluate(
                    model, h.tokenizer, h.task, h.examples, template=h.template, ends=h.ends,
                    max_new_tokens=h.max_new_tokens, rows=h.settings.rows, progress=progress,
                )  # fmt: skip
        except Stopped:
            return None
        write(result, self.own / "eval" / f"step-{step}")
        self.samples = "\n\n".join(_sample(p) for p in result.predictions[:_SAMPLES])
        self.results[step] = {
            "eval/epoch": epoch, "eval/accuracy": result.accuracy, "eval/accuracy_low": result.low, "eval/accuracy_high": result.high,
            **loss, "eval/problems": result.n, "eval/seconds": result.seconds,
        }  # fmt: skip
        return self.results[step]

    def best(self) -> int | None:
        """The trained step with the best value, the first of equal ones; None before there is one."""
        trained = {step: r[self.metric] for step, r in sorted(self.results.items()) if step > 0}
        if not trained:
            return None
        return (max if self.metric == "eval/accuracy" else min)(trained, key=trained.__getitem__)

    def keep_best(self, export: Callable[[Path], Any]) -> None:
        """RUN/best: a folder such as a run's, with the model as it stands, and evaluation.json that says of which step it is."""
        step = self.best()
        assert step is not None
        folder = self.own / BEST
        (folder / "evaluation.json").unlink(missing_ok=True)  # it must not speak of a model that is being replaced
        export(folder)
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_bytes((self.folder / "config.yaml").read_bytes())
        replace_text(folder / "evaluation.json", json.dumps({"step": step, "metric": self.metric, **self.results[step]}, indent=1) + "\n")

    def told(self, step: int) -> str:
        """One evaluation in words."""
        r, h = self.results[step], self.held_out
        loss = f", loss {r['eval/loss']:.4f}" if "eval/loss" in r else ""
        return (
            f"step {step}, epoch {r['eval/epoch']:.4g}: {h.task.name} {percent(r)} of {r['eval/problems']:.0f} problems{loss}; "
            f"{r['eval/seconds']:.1f} s"
        )

    def summary(self) -> list[str]:
        """The best model of the run next to the untrained one."""
        step = self.best()
        if step is None:
            return []
        untrained = f"; untrained {self._value(0)}" if 0 in self.results else ""
        kept = f"; that model is in {self.folder / BEST}" if (self.folder / BEST).is_dir() else ""
        return [f"best {self.metric}: {self._value(step)} after step {step}{untrained}{kept}"]

    def _value(self, step: int) -> str:
        r = self.results[step]
        return percent(r) if self.metric == "eval/accuracy" else f"{r[self.metric]:.4f}"


_SAMPLES = 5


def _sample(prediction: dict[str, Any]) -> str:
    """One prediction as evaluation/evaluate.py has it, as Markdown."""
    verdict = "right" if prediction["correct"] else f"wrong, expected `{prediction['expected']}`"
    return f"**prompt**\n\n{indent(prediction['prompt'], ' ' * 4)}\n\n**answer** ({verdict})\n\n{indent(prediction['output'], ' ' * 4)}"
