"""Conversations to tokens, with which of them the loss is on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from moejax.data import chat
from moejax.data.borders import Borders
from moejax.data.conversation import Conversation
from moejax.data.records import blank
from moejax.data.templates import asked
from moejax.data.text_tokens import TextTokens, text_tokens
from moejax.data.turns import Sample, Turns
from moejax.errors import UserError

TOGETHER = 1000  # conversations rendered and encoded at a time

Numbered = Sequence[tuple[int, Conversation]]
Encoded = tuple[list[int], np.ndarray]  # token ids, and for each whether the loss is on it


class TalkOptions(NamedTuple):
    """data.turns, and data.train_on."""

    turns: str = "auto"
    last_turn: bool = False
    roles: tuple[str, ...] = ("assistant",)


@dataclass
class Talks:
    """What became of conversations. split: of how many each answer is a query of its own, with extra_tokens more than one query of them all
    would have. empty: (record, message) of empty turns. left_out: the records by what the template leaves out of them. end: what ends a
    turn; appended: whether the end of sequence follows it, as it is no token. asked_split: by data.turns = split. thoughtless: the record
    of each answer without thinking whose prompt opens one."""

    conversations: int = 0
    answers: int = 0
    split: int = 0
    extra_tokens: int = 0
    unanswered: list[int] = field(default_factory=list)
    empty: list[tuple[int, int]] = field(default_factory=list)
    left_out: dict[str, list[int]] = field(default_factory=dict)
    thoughtless: list[int] = field(default_factory=list)
    end: str = ""
    appended: bool = False
    asked_split: bool = False

    def noted(self) -> dict[str, Sequence[Any]]:
        """What of records is reported in the notes, by its kind."""
        return {"empty": self.empty, "unanswered": self.unanswered, **self.left_out}

    def notes(self, files: Mapping[str, str] = MappingProxyType({})) -> list[str]:
        """What a user should know next to the counts. files: what says of a kind in which file its first is, where there are several."""
        found = []
        if self.split and self.asked_split:
            found.append(
                f"each answer of {_many(self.split, 'conversation')} is a query of its own, by data.turns = split: "
                f"{self.extra_tokens:,} tokens more than one query of them all"
            )
        elif self.split:
            found.append(
                f"in {_many(self.split, 'conversation')} the chat template writes an earlier answer otherwise than at use (it drops its "
                f"thinking, say): each answer is a query of its own, {self.extra_tokens:,} tokens more (data.turns = whole or last: none)"
            )
        if self.empty:
            first = "{}record {}, message {}".format(files.get("empty", ""), *self.empty[0])
            found.append(f"{_many(len(self.empty), 'empty turn')} (first: {first}): an empty answer is not trained on")
        if self.unanswered:
            first = f"{files.get('unanswered', '')}record {self.unanswered[0]}"
            have = f"{_many(len(self.unanswered), 'conversation')} {'has' if len(self.unanswered) == 1 else 'have'}"
            found.append(f"{have} no answer to train on: dropped (first: {first})")
        for kind, records in self.left_out.items():
            first = f"{files.get(kind, '')}record {records[0]}"
            found.append(f"the chat template leaves out {kind} of {_many(len(records), 'conversation')} (first: {first})")
        return found


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def encoded(
    numbered: Numbered, tokenizer: Any, template: str, options: TalkOptions, source: str
) -> tuple[list[tuple[int, Encoded]], Talks]:
    """(record, tokens) of what is trained on, in order; and what became of the conversations. Raises UserError for a conversation that the
    template refuses or has no form for, by its number."""
    if template in ("mistral", "alpaca"):
        if options != TalkOptions():
            raise UserError(
                f"{source}: data.template = {template} trains on every answer of whole conversations: remove data.turns and data.train_on, "
                "or use data.template=chat"
            )
        return _plain(numbered, tokenizer, template, source)
    if template not in ("chat", "chatml"):
        raise UserError(
            f"{source}, record {numbered[0][0]}: a conversation, and data.template = {template} has no form for its turns: use chat (the "
            "tokenizer's own template), chatml, mistral or alpaca"
        )
    tokens = text_tokens(tokenizer)
    turns = Turns(tokenizer, tokens, options.turns, options.last_turn, options.roles)
    appended = turns.end_token is None and not chat.gives_spans(tokenizer)
    talks = Talks(conversations=len(numbered), end=turns.end, appended=appended, asked_split=options.turns == "split")
    made: list[tuple[int, Encoded]] = []
    for start in range(0, len(numbered), TOGETHER):
        part = numbered[start : start + TOGETHER]
        made += _encoded_part(part, tokenizer, tokens, turns, options, source, talks)
    talks.empty, talks.left_out = turns.seen.empty, turns.seen.left_out
    return made, talks


def prompt_of_talk(talk: Conversation, tokenizer: Any, template: str, where: str) -> tuple[str, list[int]]:
    """What stands before the assistant's next turn in a conversation, and its tokens, as in training. Raises UserError where the template
    refuses it or has no form for it."""
    tokens = text_tokens(tokenizer)
    if template in ("chat", "chatml"):
        text = Turns(tokenizer, tokens).prompt(talk.messages, talk.tools, where)
        return tokens.shown(text), tokens.encode([text])[0]
    if template not in ("mistral", "alpaca"):
        raise UserError(f"{where}: data.template = {template} has no form for a conversation's turns")
    text, ids = "", list[int]()
    for number, said, system in _turns_of(talk, template, where):
        answer = talk.messages[number]["role"] == "assistant"
        part = tokens.guard(said) if answer else asked(template, tokens.guard(said), tokens.guard(system), first=not ids)
        text += part + (tokenizer.eos_token if answer else "")
        ids += tokens.encode([part])[0] + ([tokenizer.eos_token_id] if answer else [])
    return tokens.shown(text), ids


def _encoded_part(
    part: Numbered, tokenizer: Any, tokens: TextTokens, turns: Turns, options: TalkOptions, source: str, talks: Talks
) -> Iterator[tuple[int, Encoded]]:
    trained, rendered = [], []
    for index, talk in part:
        answers = turns.asked(talk, index, source)
        trained.append(answers)
        rendered.append(turns.samples(talk, answers, index, source) if answers else [])
    ids = iter(tokens.encode([sample.text for samples in rendered for sample in samples]))
    borders, end = Borders(tokens), tokenizer.eos_token_id
    for (index, talk), answers, samples in zip(part, trained, rendered, strict=True):
        if not answers:
            talks.unanswered.append(index)
            continue
        found = [_masked(sample, next(ids), borders, end) for sample in samples]
        one = len(samples) == 1
        if one and found[0] is None and options.turns == "auto":
            # A token reaches from a prompt into its answer: at use there are other tokens.
            samples = turns.samples(talk, answers, index, source, split=True)
            texts = tokens.encode([sample.text for sample in samples])
            found = [_masked(sample, own, borders, end) for sample, own in zip(samples, texts, strict=True)]
        whole = [each or _apart(sample, tokens, end) for each, sample in zip(found, samples, strict=True)]
        turns.note_left_out(talk, answers, samples, index)
        talks.thoughtless += [index for sample in samples for begin, _ in sample.spans if chat.thoughtless(sample.text, begin)]
        talks.answers += len(answers)
        if len(samples) > 1:
            talks.split += 1
            talks.extra_tokens += sum(len(own) for own, _ in whole[:-1])
        for each in whole:
            yield index, each


def _masked(sample: Sample, ids: list[int], borders: Borders, end: int) -> Encoded | None:
    """The tokens of a sample; None where one reaches from a prompt into its answer."""
    places = borders.of(sample.text, ids, [place for span in sample.spans for place in span])
    supervised = np.zeros(len(ids) + sample.ended, bool)
    for (begin, stop), first, last in zip(sample.spans, places[::2], places[1::2], strict=True):
        if first is None:
            if not sample.given:
                return None
            first = borders.nearest(sample.text, ids, begin)
        if last is None:  # white space behind the mark is in its token
            last = min(borders.nearest(sample.text, ids, stop) + 1, len(ids))
        supervised[first:last] = True
    if sample.ended:
        supervised[-1] = True
        ids = [*ids, end]
    return ids, supervised


def _apart(sample: Sample, tokens: TextTokens, end: int) -> Encoded:
    """What is read and what is trained on encoded one by one, as an answer follows its prompt at use."""
    ids: list[int] = []
    trained: list[bool] = []
    at = 0
    for begin, stop in [*sample.spans, (len(sample.text), len(sample.text))]:
        for text, supervised in ((sample.text[at:begin], False), (sample.text[begin:stop], True)):
            own = tokens.encode([text])[0] if text else []
            ids += own
            trained += [supervised] * len(own)
        at = stop
    tail = [end] if sample.ended else []
    return ids + tail, np.array(trained + [True] * len(tail), bool)


def _plain(numbered: Numbered, tokenizer: Any, template: str, source: str) -> tuple[list[tuple[int, Encoded]], Talks]:
    """`[INST] question [/INST]answer</s>`, or Alpaca's, turn after turn; what the system says stands before the first question."""
    tokens, talks = text_tokens(tokenizer), Talks(conversations=len(numbered), end=tokenizer.eos_token)
    made = []
    for index, talk in numbered:
        prompts, answers, trained = list[str](), list[str](), list[bool]()
        for number, text, system in _turns_of(talk, template, f"{source}, record {index}"):
            if blank(text):
                talks.empty.append((index, number))
            if talk.messages[number]["role"] != "assistant":
                prompts.append(asked(template, tokens.guard(text), tokens.guard(system), first=not prompts))
            else:
                answers.append(tokens.guard(text))
                trained.append(talk.trained[number] and not blank(text))
        if not any(trained):
            talks.unanswered.append(index)
            continue
        ids: list[int] = []
        supervised: list[bool] = []
        for question, said, on in zip(tokens.encode(prompts), tokens.encode(answers), trained, strict=False):
            answer = [*said, tokenizer.eos_token_id]
            ids += question + answer
            supervised += [False] * len(question) + [on] * len(answer)
        if len(prompts) > len(answers):  # a last question that nobody has answered is read, as a chat template has it
            last = tokens.encode(prompts[-1:])[0]
            ids, supervised = ids + last, supervised + [False] * len(last)
        talks.answers += sum(trained)
        made.append((index, (ids, np.array(supervised, bool))))
    return made, talks


def _turns_of(talk: Conversation, template: str, where: str) -> Iterator[tuple[int, str, str]]:
    """(message, text, what the system says before it) of questions and answers in turn. Raises UserError for what the templates mistral and
    alpaca have no form for."""
    system, expected = "", "user"
    for number, message in enumerate(talk.messages):
        role = message["role"]
        if role in ("system", "developer") and number == 0:
            system = message.get("content", "")
            continue
        if role != expected or message.get("tool_calls") or talk.tools:
            what = "a tool call" if message.get("tool_calls") else "tools" if talk.tools else f"the role {role!r}"
            raise UserError(
                f"{where}, message {number}: {what}, where data.template = {template} expects {expected!r} (users and the assistant "
                "in turn, one system message before them): use data.template=chat, the tokenizer's own template"
            )
        yield number, message.get("content", ""), system
        system, expected = "", "assistant" if role == "user" else "user"
