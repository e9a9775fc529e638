"""What a model can be tested on: a task is a data set and the one rule that decides what is right, and both are in its name."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moejax.data import places
from moejax.data.records import Record, blank, text_of, texts_in, unicode
from moejax.errors import UserError
from moejax.evaluation.answers import final_number, strict_number


@dataclass(frozen=True)
class Example:
    """One question. record: instruction, input, output; expected: the right answer."""

    record: Record
    expected: str


@dataclass(frozen=True)
class Task:
    """name, and in words the rule by which an answer is right. max_new_tokens: how long an answer may become where nobody says otherwise
    (as in LLM-Adapters' evaluation; 64 for the bundled problems). configuration: of its data set in `datasets`.

    read: an Example of a record; raises ValueError or KeyError where the record is not of this task.
    answer: what an output answers, or None; right: whether that is what was expected.
    """

    name: str
    rule: str
    read: Callable[[Record], Example]
    max_new_tokens: int
    answer: Callable[[str], str | None]
    right: Callable[[str, str], bool] = lambda answer, expected: answer == expected
    configuration: str | None = None


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


def _read_choice(words: tuple[str, ...], record: Record) -> Example:
    """A question in LLM-Adapters' text, which lists what may be answered."""
    instruction = record["instruction"]
    if record["answer"] not in words:
        raise ValueError(f"its answer is {record['answer']!r}: expected one of {', '.join(words)}")
    return Example(_record(instruction, record, record.get("output") or ""), record["answer"])


def first_word(words: tuple[str, ...], output: str) -> str | None:
    """The first of the answer words in an output, as LLM-Adapters' commonsense evaluation finds it."""
    found = re.search("|".join(words), output)
    return None if found is None else found.group()


LAST_NUMBER = "the output's last number is the answer"
STRICT = "the number after the output's first #### is the answer"
FIRST_WORD = "the output's first answer word is the right one"
SETS = {
    "hellaswag": ("ending", 4), "boolq": ("", 0), "piqa": ("solution", 2), "siqa": ("answer", 5), "winogrande": ("option", 2),
    "arc-easy": ("answer", 5), "arc-challenge": ("answer", 5), "openbookqa": ("answer", 5),
}  # fmt: skip
"""The eight commonsense sets: answers are called word1, word2, … up to this many; those of BoolQ true and false."""


def _tasks() -> dict[str, Task]:
    def number(name: str, rule: str, find_number: Callable[[str], float | None], longest: int, configuration: str | None) -> Task:
        return Task(name, rule, _read_problem, longest, lambda output: _number(find_number(output)), _same_number, configuration)

    tasks = [
        number("gsm8k", LAST_NUMBER, final_number, 256, "main"),
        number("gsm8k-strict", STRICT, strict_number, 256, "main"),
        number("problems", LAST_NUMBER, final_number, 64, None),
    ]
    for name, (word, most) in SETS.items():
        words = tuple(f"{word}{i}" for i in range(1, most + 1)) if word else ("true", "false")
        tasks.append(Task(f"{name}-generated", FIRST_WORD, partial(_read_choice, words), 32, partial(first_word, words)))
    return {task.name: task for task in tasks}


TASKS: dict[str, Task] = _tasks()
_ELSEWHERE = "log-likelihoods, and every other task, are lm-evaluation-harness's (docs/evaluation.md)"


def find(name: str) -> Task:
    """The task of this name. Raises UserError with the nearest names."""
    if name in TASKS:
        return TASKS[name]
    near = [task for task in TASKS if task.startswith(f"{name}-")] or difflib.get_close_matches(name, TASKS, 3, 0.4)
    what = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(TASKS)};"
    raise UserError(f"unknown task {name!r}: {what} {_ELSEWHERE}")


def load(task: Task, source: str, split: str | None = None, limit: int | None = None) -> list[Example]:
    """The task's examples, the first `limit` of them.

    source: files (data.places), of records with instruction, input, output and answer (LLM-Adapters) or with GSM8K's own columns; or a
    name for `datasets`, of which `split` is taken (default: test). Raises UserError naming the file and the record.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit = {limit}: expected 1 or more records")
    records = _records(task, source, split)[:limit]
    if not records:
        raise UserError(f"{source} holds no records")
    return [example(task, name, index, record) for name, index, record in records]


def _records(task: Task, source: str, split: str | None) -> list[tuple[str, int, Any]]:
    """Records as they were read, each with the name of its file and its number there."""
    configuration, folder = task.configuration, Path(source).is_dir()
    if split is not None and not folder and places.is_file(source):
        raise UserError(f"split {split!r} of {source}: a file has no splits; they belong to a folder, or a name for `datasets`")
    if folder and not Path(source, "README.md").is_file():  # which would name its configurations
        configuration = None
    parts, _ = places.read(source, configuration, split or "test", "the task's data")
    return [(part.name, index, record) for part in parts for index, record in enumerate(part.records)]


def _judge(where: str, record: Record) -> None:
    """Raises UserError for what is no text where the task reads one. A column that is not there is the reader's to tell."""
    columns = ["instruction"] if "instruction" in record else ["question"]
    columns += [name for name in ("input", "output") if record.get(name) is not None]
    for column in columns:
        if column in record:
            text_of(where, record, column)
    if "answer" in record and not isinstance(record["answer"], str | int | float):
        text_of(where, record, "answer")
    for text in texts_in(record):
        unicode(where, text)


def example(task: Task, source: str, index: int, record: Any) -> Example:
    """The task's example in record number `index` (from 0). Raises UserError that names source and record."""
    where = f"{source}, record {index}"
    own = "" if task.name in (f"{name}-generated" for name in SETS) else ", or question and answer as GSM8K has them"
    form = f"{task.name} reads instruction and answer{own}"
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object, got {type(record).__name__}; {form}")
    if "instruction" in record and record.get("answer") in (None, ""):
        raise UserError(f"{where} has no `answer`: nothing says what would be right; {form}")
    _judge(where, record)
    try:
        found = task.read(record)
    except KeyError as error:
        raise UserError(f"{where} has no {error.args[0]!r} (it has {', '.join(record)}); {form}") from None
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{where}: {str(error)[:300]}; {form}") from None
    if blank(found.record["instruction"]):
        raise UserError(f"{where} asks nothing: its prompt is empty")
    return found
