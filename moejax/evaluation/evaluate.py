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
from moejax.evaluation.loglikelihood import encode_pair, loglikelihoods
from moejax.evaluation.tasks import Example, Task
from moejax.files import replace_text
from moejax.models.build import Model

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Result:
    """accuracy = correct / n; low, high: its 95 % Wilson interval. seconds: of the whole evaluation, compilation included.

    generated_tokens: all answers' tokens, end tokens not counted (0 for a log-likelihood rule). predictions: prompt, output, answer,
    expected and correct of each example, in their order; with log-likelihoods also `scores`, one per answer.
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
    """The model's answers to the examples, greedily decoded or by log-likelihood as the task says.

    rows: examples computed together. progress(done, all) is called after each batch. template: how an instruction becomes a prompt
    (data.template); a log-likelihood rule uses none. ends: of an answer (default: the tokenizer's end of sequence). Raises UserError for
    an empty or too long prompt, naming the example.
    """
    if not examples:
        raise UserError(f"{task.name}: there are no examples")
    if rows < 1:
        raise UserError(f"rows = {rows}: expected 1 or more")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer names no end-of-sequence token: an answer would have no end")
    start, positions = time.perf_counter(), model.config.max_position_embeddings
    if task.method == "generated":
        ends = ends or Ends((tokenizer.eos_token_id,))
        texts, ids = prompts_of(tokenizer, task, examples, template, max_new_tokens, positions)
        answers = generate(model, ids, max_new_tokens=max_new_tokens, end=ends.ids, batch_size=rows, progress=progress)
        outputs = [said(tokenizer, tokens, ends)[0] for tokens in answers]
        predictions, tokens = [_judged(task, *each) for each in zip(examples, texts, outputs, strict=True)], sum(map(len, answers))
    else:
        scores = iter(loglikelihoods(model, pairs_of(tokenizer, task, examples, positions), rows=rows, progress=progress))
        each_scores = ([next(scores).loglikelihood for _ in example.candidates] for example in examples)
        predictions, tokens = [_likeliest(task, *each) for each in zip(examples, each_scores, strict=True)], 0
    seconds, n, correct = time.perf_counter() - start, len(predictions), sum(p["correct"] for p in predictions)
    return Result(task.name, task.rule, n, correct, correct / n, *wilson_interval(correct, n), seconds, tokens, predictions)


def prompts_of(
    tokenizer: Any, task: Task, examples: Sequence[Example], template: str, max_new_tokens: int, positions: int
) -> tuple[list[str], list[list[int]]]:
    """The prompts of a generated rule, and their token ids. Raises UserError for an empty one and for one that `positions` do not hold."""
    texts, ids = prompts([example.record for example in examples], tokenizer, template, f"{task.name}, example")
    for index, tokens in enumerate(ids):
        _check(task, index, len(tokens), max_new_tokens, positions)
    return texts, ids


def pairs_of(tokenizer: Any, task: Task, examples: Sequence[Example], positions: int) -> list[tuple[list[int], list[int]]]:
    """What a log-likelihood rule compares: all examples' (context, continuation), one after the other. Raises UserError as above."""
    pairs = []
    for index, example in enumerate(examples):
        for context, continuation in example.candidates:
            pair = encode_pair(tokenizer, context, continuation)
            if not pair[1]:
                raise UserError(f"{task.name}, example {index}: the answer {continuation!r} has no token of its own to score")
            _check(task, index, sum(map(len, pair)) - 1, 0, positions)  # the last token is only predicted
            pairs.append(pair)
    return pairs


def _judged(task: Task, example: Example, prompt: str, output: str) -> dict[str, Any]:
    """What is kept of a generated answer."""
    answer = task.answer(output)
    right = answer is not None and task.right(answer, example.expected)
    return {"prompt": prompt, "output": output, "answer": answer, "expected": example.expected, "correct": right}


def _likeliest(task: Task, example: Example, scores: list[float]) -> dict[str, Any]:
    """What is kept of the answer that has the highest of these log-likelihoods."""
    if task.method == "loglikelihood-normalized":  # per character, without the space before, as the harness's acc_norm
        texts = [continuation.removeprefix(" ") for _, continuation in example.candidates]
        scores = [value / max(1, len(text)) for value, text in zip(scores, texts, strict=True)]
    best = scores.index(max(scores))
    (context, continuation), answer = example.candidates[best], example.names[best]
    right = answer == example.expected
    return {
        "prompt": context, "output": continuation, "answer": answer, "expected": example.expected, "correct": right, "scores": scores,
    }  # fmt: skip


def _check(task: Task, index: int, length: int, new: int, positions: int) -> None:
    if length == 0:
        raise UserError(f"{task.name}, example {index}: its prompt is empty: there is nothing to continue")
    if length + new > positions:
        asked = f"{length} tokens and {new} new ones" if new else f"{length} tokens"
        raise UserError(
            f"{task.name}, example {index}: {asked} exceed the model's {positions} positions: shorten the prompt"
            + (" or ask for fewer new tokens" if new else "")
        )


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
