"""One model on one task: every answer and its verdict, the accuracy and its interval; and how they are kept."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moejax.data.ends import Ends
from moejax.data.tokenize import prompts
from moejax.errors import UserError
from moejax.evaluation.answers import wilson_interval
from moejax.evaluation.generate import generate, said
from moejax.evaluation.tasks import Example, Task
from moejax.files import replace_text
from moejax.models.build import Model

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Result:
    """accuracy = correct / n; low, high: its 95 % Wilson interval. seconds: of the whole evaluation, compilation included.

    generated_tokens: all answers' tokens, end tokens not counted. predictions: prompt, output, answer, expected and correct of each
    example, in their order.
    """

    task: str
    rule: str
    n: int
    correct: int
    accuracy: float
    low: float
    high: float
    seconds: float
    generated_tokens: int
    predictions: list[dict[str, Any]]


def evaluate(
    model: Model,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    rows: int,
    progress: Progress = lambda done, count: None,
    template: str = "mistral",
    ends: Ends | None = None,
) -> Result:
    """The model's answers to the examples, greedily decoded.

    rows: examples computed together. progress(done, all) is called after each batch. template: how an instruction becomes a prompt
    (data.template). ends: of an answer (default: the tokenizer's end of sequence). Raises UserError for an empty or too long prompt,
    naming the example.
    """
    if not examples:
        raise UserError(f"{task.name}: there are no examples")
    if rows < 1:
        raise UserError(f"rows = {rows}: expected 1 or more")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer names no end-of-sequence token: an answer would have no end")
    start, ends = time.perf_counter(), ends or Ends((tokenizer.eos_token_id,))
    texts, ids = prompts_of(tokenizer, task, examples, template, max_new_tokens, model.config.max_position_embeddings)
    answers = generate(model, ids, max_new_tokens=max_new_tokens, end=ends.ids, batch_size=rows, progress=progress)
    outputs = [said(tokenizer, tokens, ends)[0] for tokens in answers]
    predictions = [_judged(task, *each) for each in zip(examples, texts, outputs, strict=True)]
    seconds, n, correct = time.perf_counter() - start, len(predictions), sum(p["correct"] for p in predictions)
    tokens = sum(map(len, answers))
    return Result(task.name, task.rule, n, correct, correct / n, *wilson_interval(correct, n), seconds, tokens, predictions)


def prompts_of(
    tokenizer: Any, task: Task, examples: Sequence[Example], template: str, max_new_tokens: int, positions: int
) -> tuple[list[str], list[list[int]]]:
    """The prompts of a task, and their token ids. Raises UserError for an empty one and for one that `positions` do not hold."""
    texts, ids = prompts([example.record for example in examples], tokenizer, template, f"{task.name}, example")
    for index, tokens in enumerate(ids):
        if not tokens:
            raise UserError(f"{task.name}, example {index}: its prompt is empty: there is nothing to continue")
        if len(tokens) + max_new_tokens > positions:
            raise UserError(
                f"{task.name}, example {index}: {len(tokens)} tokens and {max_new_tokens} new ones exceed the model's {positions} "
                "positions: shorten the prompt or ask for fewer new tokens"
            )
    return texts, ids


def _judged(task: Task, example: Example, prompt: str, output: str) -> dict[str, Any]:
    """What is kept of an answer."""
    answer = task.answer(output)
    right = answer is not None and task.right(answer, example.expected)
    return {"prompt": prompt, "output": output, "answer": answer, "expected": example.expected, "correct": right}


def larger(path: Path, key: str, count: int) -> bool:
    """Whether the JSON file `path` is a result over more than `count` examples (under `key`): a look at a few does not replace it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))[key] > count
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def write(result: Result, folder: Path) -> None:
    """predictions.jsonl (one line an example) and result.json (all the rest) in `folder`; each replaces an older one at once.

    Raises UserError where the disk is full, or the folder cannot be written to.
    """
    summary = asdict(result)
    predictions = summary.pop("predictions")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / "predictions.jsonl", "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in predictions))
        replace_text(folder / "result.json", json.dumps(summary, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{folder}: the answers could not be kept there ({error.strerror}): free space or choose another folder") from None
