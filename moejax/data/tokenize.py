"""Records to token ids, with the border between prompt and answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from moejax.data import chat
from moejax.data.conversation import Conversation
from moejax.data.preferences import SIDES, Refused
from moejax.data.records import Record, blank, texts_in
from moejax.data.shelf import Shelf
from moejax.data.sums import added
from moejax.data.supervision import TalkOptions, Talks, encoded, prompt_of_talk
from moejax.data.templates import prompt_of, render
from moejax.data.text_tokens import TextTokens, text_tokens
from moejax.errors import UserError

TooLong = Literal["cut", "drop", "split"]


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

    @property
    def prompt(self) -> int:
        """Tokens before the first that the loss is on."""
        return int(np.argmax(self.supervised)) if self.supervised.any() else len(self.ids)


@dataclass
class Tokenized:
    """Queries that can be trained on, and what happened to the others. Of preferences (`pairs`) two queries a record, chosen and rejected.

    dropped = blank_answers + blank_questions (nothing is seen of them) + cut_off (nothing of the answer was left) + too_long (by
    data.too_long = drop) + conversations without an answer + pairs that say nothing. cut: shorter than they were; split: kept in several
    queries. marked: kept, with a control token of the tokenizer's or a mark of the template's in one of its texts; first_marked: (record,
    mark). unknown: tokens that stand for letters which the tokenizer lacks; first_unknown: (record, letter). thoughtless: the record of
    each answer without thinking whose prompt opens one. files: the file with the first of these, of the marked and of each kind of talks
    and pairs. talks: of conversations, if any. end: what an answer ends with. as_written: marks in a text are tokens (the template `text`).
    """

    queries: list[Query] | Shelf[Query] = field(default_factory=list)
    records: int = 0
    cut: int = 0
    blank_answers: int = 0
    blank_questions: int = 0
    cut_off: int = 0
    too_long: int = 0
    split: int = 0
    marked: int = 0
    first_marked: tuple[int, str] | None = None
    unknown: int = 0
    first_unknown: tuple[int, str] | None = None
    thoughtless: list[int] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    end: str = ""
    end_of_sequence: str = ""
    as_written: bool = False
    talks: Talks | None = None
    pairs: Refused | None = None

    @property
    def dropped(self) -> int:
        """Records of questions and answers, or conversations; of those whose answers are queries of their own, the answers."""
        seen = self.blank_answers + self.blank_questions + self.cut_off + self.too_long
        return seen + (len(self.talks.unanswered) if self.talks else 0) + (self.pairs.count if self.pairs else 0)

    def note_files(self, source: str) -> None:
        """All of what is noted is of this file."""
        noted: dict[str, Any] = {"marked": self.first_marked, "unknown": self.first_unknown, "thoughtless": self.thoughtless}
        noted |= (self.talks.noted() if self.talks else {}) | (self.pairs.noted() if self.pairs else {})
        self.files = {kind: source for kind, found in noted.items() if found}

    def note_mark(self, index: int, mark: str | None) -> None:
        """Count record number `index` where a mark was found in it."""
        if mark is not None:
            self.marked += 1
            self.first_marked = self.first_marked or (index, mark)

    def note_unknown(self, index: int, record: Record, query: Query, tokens: TextTokens) -> None:
        """Count what the tokenizer lacks of record number `index`."""
        count = tokens.unknown_in(query.ids)
        if count:
            self.unknown += count
            self.first_unknown = self.first_unknown or (index, tokens.unknown_letter(_texts(record)))

    def add(self, query: Query, max_length: int, too_long: TooLong) -> None:
        """A record's query, cut, dropped or split where it is longer than `max_length`. Each part of a split one begins with the last token
        of the part before it, so that every token is predicted once."""
        n, parts = len(query.ids), [query]
        if n > max_length:
            if too_long == "drop":
                self.too_long += 1
                return
            starts = range(0, n - 1, max(max_length - 1, 1)) if too_long == "split" else (0,)
            parts = [Query(query.ids[at : at + max_length], query.supervised[at : at + max_length]) for at in starts]
            self.split += too_long == "split"
            self.cut += too_long == "cut"
        # The first token is never predicted: a query needs a supervised target after it.
        kept = [part for part in parts if part.supervised[1:].any()]
        self.cut_off += not kept
        self.queries.extend(kept)


def tokenize(
    records: Sequence[Record],
    tokenizer: Any,
    template: str,
    max_length: int,
    source: str = "the data",
    first: int = 0,
    options: TalkOptions | None = None,
    *,
    whole: bool = True,
    too_long: TooLong = "cut",
) -> Tokenized:
    """Prompt and answer are encoded apart and joined, and the end of sequence appended: so the study's trainer did, and so the
    border is exact whatever the tokenizer would merge across it. `chat`: the template's whole text is encoded, and its end of turn is
    the answer's end where it is a token of the tokenizer.

    What a record says is text: a control token's name in it becomes no control token (but with the template `text`, whose records are
    written with their marks). A query longer than `max_length` is cut, dropped or split, as `too_long` says, and counted; one with nothing
    supervised left is dropped and counted. Conversations become queries as `supervision` has it, by `options`. source, and the number of
    its record with which these begin: for messages. Raises UserError if none is left, where these are the `whole` data.
    """
    out = Tokenized(records=len(records), end_of_sequence=tokenizer.eos_token, as_written=template == "text")
    tokens, marks = text_tokens(tokenizer), _marks(template, tokenizer)
    kept, talks = [], []
    for index, record in enumerate(records, first):
        talk = record.get("conversation")
        if talk is not None:
            talks.append((index, talk))
            out.note_mark(index, _mark_in_talk(talk, tokens, marks))
        elif blank(record["text" if template == "text" else "output"]):
            out.blank_answers += 1
        elif template != "text" and blank(record["instruction"] + record["input"]):
            out.blank_questions += 1
        else:
            kept.append((index, record))
            out.note_mark(index, _mark_in(record, tokens, marks))
    numbered, out.talks, out.end, out.thoughtless = _queries(kept, talks, tokenizer, template, source, options or TalkOptions())
    for index, query in sorted(numbered, key=lambda each: each[0]):
        out.note_unknown(index, records[index - first], query, tokens)
        out.add(query, max_length, too_long)
    out.note_files(source)
    if whole:
        check_left(out, source, max_length)
    return out


def check_left(out: Tokenized, source: str, max_length: int) -> None:
    """Raises UserError where nothing is left to train on."""
    if not out.queries:
        without = f"{len(out.talks.unanswered)} have no answer to train on, " if out.talks and out.talks.unanswered else ""
        if out.pairs is not None:
            refused = out.pairs
            raise UserError(
                f"{source}: no pair is left to train on: of {out.records} records {len(refused.equal)} have equal sides, "
                f"{len(refused.empty)} a side without an answer, {out.too_long} are too long, and of {len(refused.emptied)} a side is cut "
                f"off at data.max_length = {max_length}"
            )
        raise UserError(
            f"{source}: no query has a supervised token left: of {out.records} records {without}{out.blank_answers} have a blank answer, "
            f"{out.blank_questions} a blank question, {out.too_long} are too long, and {out.cut_off} answers are cut off at "
            f"data.max_length = {max_length}"
        )


def _queries(
    records: Sequence[tuple[int, Record]],
    talks: Sequence[tuple[int, Conversation]],
    tokenizer: Any,
    template: str,
    source: str,
    options: TalkOptions,
) -> tuple[list[tuple[int, Query]], Talks | None, str, list[int]]:
    """(record, query) of records of both kinds; what ends an answer; and the records without a thinking that their prompt opens."""
    found: list[tuple[int, Query]] = []
    thoughtless: list[int] = []
    seen, end = None, tokenizer.eos_token
    if talks:
        tokens, seen = encoded(talks, tokenizer, template, options, source)
        found = [(index, Query(np.array(ids, np.int32), supervised)) for index, (ids, supervised) in tokens]
        thoughtless += seen.thoughtless
        end = _end_of_talks(seen, tokenizer)
    if records:
        pairs, end, bare = _pairs(records, tokenizer, template, source)
        thoughtless += bare
        made = (Query.after(len(prompt), np.array(prompt + answer, np.int32)) for prompt, answer in pairs)
        found += zip((index for index, _ in records), made, strict=True)
    return found, seen, end, thoughtless


def _end_of_talks(talks: Talks, tokenizer: Any) -> str:
    """What an answer ends with."""
    return f"{talks.end}{tokenizer.eos_token}" if talks.appended else text_tokens(tokenizer).control_at(talks.end) or tokenizer.eos_token


def tokenize_pairs(
    records: Sequence[Record], tokenizer: Any, template: str, max_length: int, source: str = "the data", first: int = 0,
    options: TalkOptions | None = None, *, too_long: TooLong = "cut",
) -> Tokenized:  # fmt: skip
    """Both sides of preferences, each as supervised training has it; supervised are the answers behind the prompt that they share.

    A side longer than `max_length` is cut at its end (TRL's `keep_start`), or its pair left out. Pairs that say nothing are left out and
    counted: equal sides, also after the cut, and a side without a supervised token. Otherwise as `tokenize`.
    """
    refused = Refused()
    out = Tokenized(records=len(records), end_of_sequence=tokenizer.eos_token, pairs=refused)
    tokens, marks = text_tokens(tokenizer), _marks(template, tokenizer)
    kept = []
    for index, record in enumerate(records, first):
        if record["conversation"] == record["rejected"]:
            refused.equal.append(index)
            continue
        kept.append((index, record))
        out.note_mark(index, _mark_in_talk(record["conversation"], tokens, marks) or _mark_in_talk(record["rejected"], tokens, marks))
    sides: list[dict[int, Query]] = []
    for key, side in (("conversation", "chosen"), ("rejected", "rejected")):
        talks = [(index, record[key]) for index, record in kept]
        found, seen = encoded(talks, tokenizer, template, options or TalkOptions(), f"{source}, {side}") if talks else ([], Talks())
        made: dict[int, Query] = {}
        for index, (ids, supervised) in found:
            if index in made:
                raise UserError(
                    f"{source}, record {index}, {side}: the chat template writes one of its several answers otherwise in the whole "
                    "conversation than at use, and a side of a preference is one query: set data.turns to whole or last"
                )
            made[index] = Query(np.array(ids, np.int32), supervised)
            out.note_unknown(index, {"conversation": records[index - first][key]}, made[index], tokens)
        sides.append(made)
        if talks:
            out.talks = added([out.talks, seen]) if out.talks else seen
            out.end = _end_of_talks(seen, tokenizer)
            out.thoughtless += seen.thoughtless
    if out.talks:
        out.talks.unanswered.clear()  # counted with their pairs
    for index, _ in kept:
        pair = [made[index] for made in sides if index in made]
        whole = max((len(query.ids) for query in pair), default=0)
        cut = [Query(query.ids[:max_length], query.supervised[:max_length]) for query in pair]
        if len(pair) < len(SIDES):
            refused.empty.append(index)
        elif whole > max_length and too_long == "drop":
            out.too_long += 1
        elif not all(query.supervised[1:].any() for query in cut):
            refused.emptied.append(index)
        elif all(np.array_equal(a, b) for a, b in zip(*cut, strict=True)):
            refused.equal.append(index)
        else:
            out.queries.extend(cut)
            out.cut += whole > max_length
    out.note_files(source)
    return out


def prompts(records: Sequence[Record], tokenizer: Any, template: str, source: str = "prompt") -> tuple[list[str], list[list[int]]]:
    """The prompts of records as they are read, and their token ids, as in training. With `text`, which has no instructions: the
    question as it stands. Of conversations (all of them or none): what stands before the assistant's next turn."""
    tokens = text_tokens(tokenizer)
    rendered = []
    if any("conversation" in record for record in records):
        asked = [prompt_of_talk(record["conversation"], tokenizer, template, f"{source} {i}") for i, record in enumerate(records)]
        return [text for text, _ in asked], [ids for _, ids in asked]
    for index, record in enumerate(records):
        guarded = _guarded(tokens, record)
        if template == "text":
            rendered.append("\n".join(part for part in (guarded["instruction"], guarded["input"]) if part))
        else:
            rendered.append(prompt_of(template, guarded, tokenizer, f"{source} {index}"))
    return [tokens.shown(text) for text in rendered], tokens.encode(rendered)


def _pairs(
    numbered: Sequence[tuple[int, Record]], tokenizer: Any, template: str, source: str
) -> tuple[list[tuple[list[int], list[int]]], str, list[int]]:
    """Token ids of prompts and answers, each answer with its end; the end; and the records without a thinking that their prompt opens."""
    tokens, eos = text_tokens(tokenizer), [tokenizer.eos_token_id]
    if template == "text":
        texts = [record["text"] for _, record in numbered]
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [([], encoding.ids + eos) for encoding in encodings], tokenizer.eos_token, []
    where = f"{source}, record"
    turns = [render(template, _guarded(tokens, record), tokenizer, f"{where} {index}") for index, record in numbered]
    asked = tokens.encode([prompt for prompt, _ in turns])
    if template not in ("chat", "chatml"):
        answers = tokens.encode([answer for _, answer in turns])
        return [(prompt, answer + eos) for prompt, answer in zip(asked, answers, strict=True)], tokenizer.eos_token, []
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
    shown = zip(numbered, turns, strict=True)
    thoughtless = [index for (index, _), (prompt, answer) in shown if chat.thoughtless(prompt + answer, len(prompt))]
    return pairs, token or f"{end}{tokenizer.eos_token}", thoughtless


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
    return {name: tokens.guard(value, own=name == "output") if isinstance(value, str) else value for name, value in record.items()}


def _marks(template: str, tokenizer: Any) -> tuple[str, ...]:
    """What tells prompts and answers apart in a rendered text, be it a token or not."""
    ours = {"mistral": "[INST] [/INST]", "alpaca": "### Instruction: ### Input: ### Response:", "text": ""}
    written = ours[template] if template in ours else chat.literals(tokenizer)
    return tuple(dict.fromkeys(chat.MARK.findall(written)))


def _texts(record: Record) -> Iterator[str]:
    """What a record says."""
    talk = record.get("conversation")
    if talk is None:
        yield from (record[name] for name in ("instruction", "input", "output", "text") if record.get(name))
    else:
        yield from (text for message in talk.messages for text in texts_in(message, 9))


def _mark_in(record: Record, tokens: TextTokens, marks: tuple[str, ...]) -> str | None:
    """The first control token or mark in a record's texts."""
    texts = ((record.get(name), name == "output") for name in ("instruction", "input", "output", "text"))
    return next((found for text, own in texts if (found := _mark_of(text, tokens, marks, own))), None)


def _mark_in_talk(talk: Conversation, tokens: TextTokens, marks: tuple[str, ...]) -> str | None:
    said = ((text, message["role"] == "assistant") for message in talk.messages for text in texts_in(message, 9))
    return next((found for text, own in said if (found := _mark_of(text, tokens, marks, own))), None)


def _mark_of(text: str | None, tokens: TextTokens, marks: tuple[str, ...], own: bool) -> str | None:
    if not text:
        return None
    return tokens.control_in(text, own=own) or next((mark for mark in marks if mark in text and not (own and mark in tokens.tags)), None)
