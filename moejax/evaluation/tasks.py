"""What a model can be tested on: a task is a data set and the one rule that decides what is right, and both are in its name."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from moejax.data import places
from moejax.data.records import Record, blank, text_of, texts_in, unicode
from moejax.errors import UserError
from moejax.estimator.units import counted
from moejax.evaluation.answers import final_number, strict_number
from moejax.evaluation.choices import SETS, Candidates, Choice

Method = Literal["generated", "loglikelihood", "loglikelihood-normalized"]


@dataclass(frozen=True)
class Example:
    """One question. record: instruction, input, output (rendered with a template where the answer is generated); expected: the right
    answer; candidates: (context, continuation) of each answer that a log-likelihood rule compares, and their names."""

    record: Record
    expected: str
    candidates: Candidates = ()
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """name, and in words the rule by which an answer is right. hub: name, configuration and split for `datasets`. max_new_tokens: how
    long an answer may become where nobody says otherwise (as in LLM-Adapters' evaluation; 64 for the bundled problems).

    read: an Example of a record; raises ValueError or KeyError where the record is not of this task.
    answer: what a generated output answers, or None; right: whether that is what was expected.
    """

    name: str
    rule: str
    method: Method
    hub: tuple[str, str | None, str]
    columns: tuple[str, ...]
    read: Callable[[Record], Example]
    max_new_tokens: int = 32
    answer: Callable[[str], str | None] = lambda output: None
    right: Callable[[str, str], bool] = lambda answer, expected: answer == expected


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.15g}"


def _same_number(answer: str, expected: str) -> bool:
    return abs(float(answer) - float(expected)) < 1e-6


def _read_problem(record: Record) -> Example:
    """A record with instruction and answer, or GSM8K's own question and answer, whose last line is `#### N`."""
    if "question" in record:
        asked, output = record["question"], str(record["answer"])
        expected = strict_number(output)
        if expected is None:
            raise ValueError(f"its answer has no '#### N': {output[-60:]!r}")
    else:
        asked, output = record["instruction"], record.get("output") or ""
        expected = final_number(str(record["answer"]))
        if expected is None:
            raise ValueError(f"its answer is no number: {record['answer']!r}")
    if not math.isfinite(expected):
        raise ValueError("its answer is a number beyond all that can be compared")
    return Example(_record(asked, record, output), str(_number(expected)))


def _record(instruction: str, record: Record, output: str) -> Record:
    return {"instruction": instruction, "input": record.get("input") or "", "output": output}


def _read_choice(choice: Choice, method: Method, record: Record) -> Example:
    adapters = "instruction" in record
    if adapters and record["answer"] not in choice.words:
        raise ValueError(f"its answer is {record['answer']!r}: expected one of {', '.join(choice.words)}")
    if adapters and method == "generated":
        return Example(_record(record["instruction"], record, record.get("output") or ""), record["answer"])
    question = choice.parsed(record) if adapters else choice.read(record)
    if not 0 <= question.right < len(question.options):
        raise ValueError(f"it has {counted(len(question.options), 'answer')}, and the right one is number {question.right + 1}")
    expected = choice.words[question.right]
    asked = _record(choice.instruction(question), {}, f"the correct answer is {expected}")
    if method == "generated":
        return Example(asked, expected)
    return Example(asked, expected, choice.candidates(question), choice.words[: len(question.options)])


def first_word(words: tuple[str, ...], output: str) -> str | None:
    """The first of the answer words in an output, as LLM-Adapters' commonsense evaluation finds it."""
    found = re.search("|".join(words), output)
    return None if found is None else found.group()


NUMBERS: dict[str, tuple[str, Callable[[str], float | None], tuple[str, str | None, str]]] = {
    "gsm8k": ("the output's last number is the answer", final_number, ("openai/gsm8k", "main", "test")),
    "gsm8k-strict": ("the number after the output's first #### is the answer", strict_number, ("openai/gsm8k", "main", "test")),
    "problems": ("the output's last number is the answer", final_number, ("", None, "test")),
}
HUB: dict[str, tuple[str, str | None, str]] = {
    "hellaswag": ("Rowan/hellaswag", None, "validation"),
    "boolq": ("google/boolq", None, "validation"),
    "piqa": ("ybisk/piqa", None, "validation"),
    "siqa": ("allenai/social_i_qa", None, "validation"),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation"),
    "arc-easy": ("allenai/ai2_arc", "ARC-Easy", "test"),
    "arc-challenge": ("allenai/ai2_arc", "ARC-Challenge", "test"),
    "openbookqa": ("allenai/openbookqa", "main", "test"),
}
RULES: dict[Method, str] = {
    "generated": "the output's first answer word is the right one",
    "loglikelihood": "the right answer's text has the highest log-likelihood",
    "loglikelihood-normalized": "the right answer's text has the highest log-likelihood per character",
}


def _tasks() -> dict[str, Task]:
    tasks = []
    for name, (rule, number, hub) in NUMBERS.items():

        def answer(output: str, number: Callable[[str], float | None] = number) -> str | None:
            return _number(number(output))

        longest = 64 if name == "problems" else 256
        tasks.append(Task(name, rule, "generated", hub, ("question", "answer"), _read_problem, longest, answer, _same_number))
    for name, choice in SETS.items():
        for method, rule in RULES.items():
            read = partial(_read_choice, choice, method)
            find_word = partial(first_word, choice.words)
            tasks.append(Task(f"{name}-{method}", rule, method, HUB[name], choice.columns, read, answer=find_word))
    return {task.name: task for task in tasks}


TASKS: dict[str, Task] = _tasks()


def find(name: str) -> Task:
    """The task of this name. Raises UserError with the nearest names."""
    if name in TASKS:
        return TASKS[name]
    near = [task for task in TASKS if task.startswith(f"{name}-")] or difflib.get_close_matches(name, TASKS, 3, 0.4)
    raise UserError(
        f"unknown task {name!r}: did you mean {', '.join(near)}?"
        if near
        else f"unknown task {name!r}: there are {', '.join(TASKS)}"
    )


def load(task: Task, source: str, split: str | None = None, limit: int | None = None) -> list[Example]:
    """The task's examples, the first `limit` of them.

    source: files (data.places), of records with instruction, input, output and answer (LLM-Adapters) or with the columns of the set
    itself; or a name for `datasets`, of which `split` is taken (default: the task's). Raises UserError naming the file and the record.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit = {limit}: expected 1 or more records")
    records = _records(task, source, split)[:limit]
    if not records:
        raise UserError(f"{source} holds no records")
    return [example(task, name, index, record) for name, index, record in records]


def _records(task: Task, source: str, split: str | None) -> list[tuple[str, int, Any]]:
    """Records as they were read, each with the name of its file and its number there."""
    _, configuration, usual = task.hub
    folder = Path(source).is_dir()
    if split is not None and not folder and places.is_file(source):
        raise UserError(f"split {split!r} of {source}: a file has no splits; they belong to a folder, or a name for `datasets`")
    if folder and not Path(source, "README.md").is_file():  # which would name its configurations
        configuration = None
    parts, _ = places.read(source, configuration, split or usual, "the task's data")
    return [(part.name, index, record) for part in parts for index, record in enumerate(part.records)]


# What the sets' columns hold that is not one text: a number, a yes or no, or a text that says it; texts; texts with their labels.
_VALUES, _LISTS = ("label", "answer"), ("endings",)


def _judge(where: str, record: Record, columns: tuple[str, ...]) -> None:
    """Raises UserError for what is no text where the task reads one. A column that is not there is the reader's to tell."""
    if "instruction" in record:
        columns = ("instruction", *(name for name in ("input", "output") if record.get(name) is not None), "answer")
    for column in columns:
        value = record.get(column)
        if column not in record or (column in _VALUES and isinstance(value, str | int)):
            continue
        if column == "choices" and isinstance(value, dict):
            value, column = value.get("text"), "choices.text"
        if column in (*_LISTS, "choices.text"):
            if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
                raise UserError(f"{where}: {column!r} is no list of texts")
        elif not (column == "answer" and isinstance(value, float)):
            text_of(where, record, column)
    for text in texts_in(record):
        unicode(where, text)


def example(task: Task, source: str, index: int, record: Any) -> Example:
    """The task's example in record number `index` (from 0). Raises UserError that names source and record."""
    where = f"{source}, record {index}"
    form = f"{task.name} reads instruction and answer, or {', '.join(task.columns)}"
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object, got {type(record).__name__}; {form}")
    if "instruction" in record and record.get("answer") in (None, ""):
        raise UserError(f"{where} has no `answer`: nothing says what would be right; {form}")
    _judge(where, record, task.columns)
    try:
        found = task.read(record)
    except KeyError as error:
        raise UserError(f"{where} has no {error.args[0]!r} (it has {', '.join(record)}); {form}") from None
    except (ValueError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise UserError(f"{where}: {str(error)[:300]}; {form}") from None
    if blank(found.record["instruction"]):
        raise UserError(f"{where} asks nothing: its prompt is empty")
    return found
