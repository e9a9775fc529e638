"""The eight commonsense sets: what their records say, in their own columns or in LLM-Adapters' text, and how each is asked."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

Record = dict[str, Any]
Candidates = tuple[tuple[str, str], ...]


class Question(NamedTuple):
    """A question, what may be answered, and which of that is right (from 0). passage: a text that the question is about (BoolQ)."""

    context: str
    options: tuple[str, ...]
    right: int
    passage: str = ""


@dataclass(frozen=True)
class Choice:
    """A set of questions.

    word: answers are called word1, word2, … in LLM-Adapters' text (empty: true and false). head, between: what stands before the
    question and between the answers there. most: the largest number of answers. columns: what the set's own columns are called, and
    `read` makes a Question of them. candidates: (context, continuation) of every answer, as lm-evaluation-harness scores this set.
    """

    word: str
    head: str
    between: str
    most: int
    columns: tuple[str, ...]
    read: Callable[[Record], Question]
    candidates: Callable[[Question], Candidates]
    before_format: str = "\n\n"

    @property
    def words(self) -> tuple[str, ...]:
        """What an answer may be called, in the order of the answers."""
        return tuple(f"{self.word}{i}" for i in range(1, self.most + 1)) if self.word else ("true", "false")

    def instruction(self, question: Question) -> str:
        """The question in LLM-Adapters' text."""
        if not self.word:
            return f"{self.head}{question.context}\n\nAnswer format: true/false"
        names = self.words[: len(question.options)]
        options = self.between.join(f"{n.capitalize()}: {o}" for n, o in zip(names, question.options, strict=True))
        return f"{self.head}{question.context}\n\n{options}{self.before_format}Answer format: {'/'.join(names)}"

    def parsed(self, record: Record) -> Question:
        """The question of a record in LLM-Adapters' text. Raises ValueError, saying what is not as expected."""
        text, answer = record["instruction"], record["answer"]
        if not text.startswith(self.head):
            raise ValueError(f"its instruction does not begin with {self.head!r}")
        right = self.words.index(answer)
        if not self.word:
            return Question(text[len(self.head) :].split("\n\nAnswer format:")[0].strip(), self.words, right)
        name = self.word.capitalize()
        found = re.fullmatch(rf"(.*?)\s*\b{name}1:(.*)\s*Answer format:.*", text[len(self.head) :], re.DOTALL)
        if found is None:
            raise ValueError(f"its instruction has no {name}1: … Answer format: …")
        options = re.split(rf"\b{name}\d:", found[2])
        return Question(found[1].strip(), tuple(part.strip() for part in options), right)


def _hellaswag(record: Record) -> Question:
    context = record.get("ctx")
    if "ctx_a" in record and "ctx_b" in record:
        context = f"{record['ctx_a']} {record['ctx_b'].capitalize()}"
    label = f"{record['activity_label']}: " if record.get("activity_label") else ""
    return Question(_without_tags(f"{label}{context}"), tuple(map(_without_tags, record["endings"])), _number(record, "label"))


def _number(record: Record, column: str) -> int:
    """Which answer is right, of a column that holds a number or a text that says it. Raises ValueError for what is no whole number."""
    value = record[column]
    if not isinstance(value, bool) and (not isinstance(value, float) or value.is_integer()):
        with suppress(ValueError):
            return int(value)
    raise ValueError(f"its {column} is {value!r}: expected the number of an answer")


def _without_tags(text: str) -> str:
    """HellaSwag's WikiHow texts have marks such as [title] and [step] in them: a title begins a sentence, the others go."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ").strip()


def _lettered(question: str) -> Callable[[Record], Question]:
    """ARC and OpenBookQA: choices = {text, label}, and the right one's label under answerKey."""

    def read(record: Record) -> Question:
        choices = record["choices"]
        return Question(record[question], tuple(choices["text"]), list(choices["label"]).index(record["answerKey"]))

    return read


def _boolq(record: Record) -> Question:
    said = str(record["answer"]).lower()
    if said not in ("true", "1", "false", "0"):
        raise ValueError(f"its answer is {record['answer']!r}: expected true or false")
    right = 0 if said in ("true", "1") else 1
    question = str(record["question"]).rstrip("?")
    return Question(f"{question}?", ("true", "false"), right, str(record.get("passage") or ""))


def _each(context: str, options: tuple[str, ...]) -> Candidates:
    return tuple((context, f" {option}") for option in options)


def _boolq_candidates(q: Question) -> Candidates:
    passage = f"{q.passage}\n" if q.passage else ""
    return _each(f"{passage}Question: {q.context}\nAnswer:", ("yes", "no"))


def _winogrande_candidates(q: Question) -> Candidates:
    """The same rest of the sentence after each name: what is scored is the rest, not the name."""
    before, _, after = q.context.partition("_")
    return tuple((f"{before}{option}", f" {after.strip()}") for option in q.options)


ANSWER = "Please choose the correct answer to the question: "


def _multiple_choice(columns: tuple[str, ...], read: Callable[[Record], Question], context: str) -> Choice:
    def candidates(q: Question) -> Candidates:
        return _each(context.format(q.context), q.options)

    return Choice("answer", ANSWER, " ", 5, columns, read, candidates)


SETS: dict[str, Choice] = {
    "hellaswag": Choice(
        "ending", "Please choose the correct ending to complete the given sentence: ", " ", 4, ("ctx", "endings", "label"),
        _hellaswag, lambda q: _each(q.context, q.options),
    ),
    "boolq": Choice(
        "", "Please answer the following question with true or false, question: ", "", 2, ("question", "answer"),
        _boolq, _boolq_candidates,
    ),
    "piqa": Choice(
        "solution", "Please choose the correct solution to the question: ", "\n\n", 2, ("goal", "sol1", "sol2", "label"),
        lambda r: Question(r["goal"], (r["sol1"], r["sol2"]), _number(r, "label")),
        lambda q: _each(f"Question: {q.context}\nAnswer:", q.options),
    ),
    "siqa": _multiple_choice(
        ("context", "question", "answerA", "answerB", "answerC", "label"),
        lambda r: Question(f"{r['context']} {r['question']}", (r["answerA"], r["answerB"], r["answerC"]), _number(r, "label") - 1),
        "Q: {}\nA:",
    ),
    "winogrande": Choice(
        "option", "Please choose the correct answer to fill in the blank to complete the given sentence: ", " ", 2,
        ("sentence", "option1", "option2", "answer"),
        lambda r: Question(r["sentence"], (r["option1"], r["option2"]), _number(r, "answer") - 1),
        _winogrande_candidates, " ",
    ),
    "arc-easy": _multiple_choice(("question", "choices", "answerKey"), _lettered("question"), "Question: {}\nAnswer:"),
    "arc-challenge": _multiple_choice(("question", "choices", "answerKey"), _lettered("question"), "Question: {}\nAnswer:"),
    "openbookqa": _multiple_choice(("question_stem", "choices", "answerKey"), _lettered("question_stem"), "{}"),
}  # fmt: skip
