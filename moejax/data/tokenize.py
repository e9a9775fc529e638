"""Records to token ids, with the border between prompt and answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from moejax.data import chat
from moejax.data.records import Record, blank
from moejax.data.templates import prompt_of, render
from moejax.data.text_tokens import TextTokens, text_tokens
from moejax.errors import UserError


class Query(NamedTuple):
    """One tokenized record, or one turn of a conversation. ids: int32 [n]; supervised: bool [n], which of them the loss is on.

    The first token is never predicted, supervised or not.
    """

    ids: np.ndarray
    supervised: np.ndarray

    @classmethod
    def after(cls, prompt: int, ids: np.ndarray) -> Query:
        """A query whose first `prompt` tokens are only read, and all others supervised."""
        return cls(ids, np.arange(len(ids)) >= prompt)


@dataclass
class Tokenized:
    """Queries that can be trained on, and what happened to the others.

    dropped = blank_answers + blank_questions (nothing is seen of them) + cut_off (nothing of the answer was left). cut: kept, but
    shorter. marked: kept, with a control token of the tokenizer's or a mark of the template's in one of its texts; first_marked:
    (record, mark). end: what an answer ends with. as_written: marks in a text are tokens (the template `text`).
    """

    queries: list[Query] = field(default_factory=list)
    records: int = 0
    cut: int = 0
    blank_answers: int = 0
    blank_questions: int = 0
    cut_off: int = 0
    marked: int = 0
    first_marked: tuple[int, str] | None = None
    end: str = ""
    end_of_sequence: str = ""
    as_written: bool = False

    @property
    def dropped(self) -> int:
        return self.blank_answers + self.blank_questions + self.cut_off


def tokenize(
    records: Sequence[Record], tokenizer: Any, template: str, max_length: int, source: str = "the data", first: int = 0
) -> Tokenized:
    """Prompt and answer are encoded apart and joined, and the end of sequence appended: so the study's trainer did, and so the
    border is exact whatever the tokenizer would merge across it. `chat`: the template's whole text is encoded, and its end of turn is
    the answer's end where it is a token of the tokenizer.

    What a record says is text: a control token's name in it becomes no control token (but with the template `text`, whose records are
    written with their marks). A query longer than `max_length` is cut at its end (and counted); one with nothing supervised left is
    dropped (and counted). source, and the number of its record with which these begin: for messages. Raises UserError if none is left.
    """
    out = Tokenized(records=len(records), end_of_sequence=tokenizer.eos_token, as_written=template == "text")
    tokens, marks = text_tokens(tokenizer), _marks(template, tokenizer)
    kept = []
    for index, record in enumerate(records, first):
        if blank(record["text" if template == "text" else "output"]):
            out.blank_answers += 1
        elif template != "text" and blank(record["instruction"] + record["input"]):
            out.blank_questions += 1
        else:
            kept.append((index, record))
            mark = _mark_in(record, tokens, marks)
            if mark is not None:
                out.marked += 1
                out.first_marked = out.first_marked or (index, mark)
    pairs, out.end = _pairs(kept, tokenizer, template, source)
    for prompt, answer in pairs:
        ids = prompt + answer
        if len(ids) > max_length:
            out.cut += 1
            ids = ids[:max_length]
        # The first token is never predicted: a query needs a supervised target after it.
        if len(ids) <= max(len(prompt), 1):
            out.cut_off += 1
            continue
        out.queries.append(Query.after(len(prompt), np.array(ids, np.int32)))
    if not out.queries:
        raise UserError(
            f"{source}: no query has a supervised token left: of {len(records)} records {out.blank_answers} have a blank answer, "
            f"{out.blank_questions} a blank question, and {out.cut_off} answers are cut off at data.max_length = {max_length}"
        )
    return out


def prompts(records: Sequence[Record], tokenizer: Any, template: str, source: str = "prompt") -> tuple[list[str], list[list[int]]]:
    """The prompts of records as they are read, and their token ids, as in training. With `text`, which has no instructions: the
    question as it stands."""
    tokens = text_tokens(tokenizer)
    rendered = []
    for index, record in enumerate(records):
        guarded = _guarded(tokens, record)
        if template == "text":
            rendered.append("\n".join(part for part in (guarded["instruction"], guarded["input"]) if part))
        else:
            rendered.append(prompt_of(template, guarded, tokenizer, f"{source} {index}"))
    return [tokens.shown(text) for text in rendered], tokens.encode(rendered)


def _pairs(
    numbered: Sequence[tuple[int, Record]], tokenizer: Any, template: str, source: str
) -> tuple[list[tuple[list[int], list[int]]], str]:
    """Token ids of prompts and answers, each answer with its end; and the end."""
    tokens, eos = text_tokens(tokenizer), [tokenizer.eos_token_id]
    if template == "text":
        texts = [record["text"] for _, record in numbered]
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [([], encoding.ids + eos) for encoding in encodings], tokenizer.eos_token
    where = f"{source}, record"
    turns = [render(template, _guarded(tokens, record), tokenizer, f"{where} {index}") for index, record in numbered]
    asked = tokens.encode([prompt for prompt, _ in turns])
    if template != "chat":
        answers = tokens.encode([answer for _, answer in turns])
        return [(prompt, answer + eos) for prompt, answer in zip(asked, answers, strict=True)], tokenizer.eos_token
    end = chat.end_of_turn(tokenizer)
    token = tokens.control_at(end)
    cut = [_ended(answer, end, token, f"{where} {index}") for (index, _), (_, answer) in zip(numbered, turns, strict=True)]
    wholes = tokens.encode([prompt + answer for (prompt, _), answer in zip(turns, cut, strict=True)])
    alone = tokens.encode(cut)  # where the tokenizer merges across the border
    tail = eos if token is None else []
    pairs = [
        (prompt, (whole[len(prompt) :] if whole[: len(prompt)] == prompt else answer) + tail)
        for prompt, whole, answer in zip(asked, wholes, alone, strict=True)
    ]
    return pairs, token or f"{end}{tokenizer.eos_token}"


def _ended(answer: str, end: str, token: str | None, where: str) -> str:
    """An answer as the chat template writes it up to the end of the turn, which is `token` where that is a token."""
    if not end:
        return answer
    body, found, _ = answer.rpartition(end)
    if not found:
        raise UserError(
            f"data.template = chat, {where}: the chat template ends this turn with {answer[-40:]!r}, others with {end!r}: where the answer "
            "ends is not known. Use data.template = mistral or alpaca, or another chat template"
        )
    return body + (token or end)


def _guarded(tokens: TextTokens, record: Record) -> Record:
    return {name: tokens.guard(value) if isinstance(value, str) else value for name, value in record.items()}


def _marks(template: str, tokenizer: Any) -> tuple[str, ...]:
    """What tells prompts and answers apart in a rendered text, be it a token or not."""
    written = {
        "mistral": "[INST] [/INST]", "alpaca": "### Instruction: ### Input: ### Response:", "chat": chat.literals(tokenizer), "text": ""
    }[template]  # fmt: skip
    return tuple(dict.fromkeys(chat.MARK.findall(written)))


def _mark_in(record: Record, tokens: TextTokens, marks: tuple[str, ...]) -> str | None:
    """The first control token or mark in a record's texts."""
    for name in ("instruction", "input", "output", "text"):
        text = record.get(name)
        if text:
            found = tokens.control_in(text) or next((mark for mark in marks if mark in text), None)
            if found is not None:
                return found
    return None
