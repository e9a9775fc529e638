"""Conversations as the chat template writes them, and which characters of that are trained on: every answer, from the end of its prompt
to the end of the turn."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, product, zip_longest
from typing import Any, NamedTuple

from moejax.data import chat
from moejax.data.conversation import Conversation, Message
from moejax.data.records import blank, texts_in
from moejax.data.text_tokens import TextTokens
from moejax.errors import UserError

Spans = dict[int, tuple[int, int]]  # message -> the characters (from, to) that are trained on

_ADVICE = "Write the messages as the template takes them, or use another chat template (data.template = chatml or mistral)"
_PROBE = ("a question", "an answer", "more", "the end")
_OTHER = "\U0010f8f4"  # what no message says
_KEPT = ("role", "content", "tool_calls", "reasoning_content")  # of a message, whether the template knows them or not
_KINDS = {"assistant": "answers", "tool": "tool results"}


class Sample(NamedTuple):
    """text: as rendered; spans: the characters that are trained on. given: by the template's own `{% generation %}`. ended: whether the
    tokenizer's end of sequence follows, because the template ends a turn with no token. complete: whether every content is known to stand
    in it."""

    text: str
    spans: list[tuple[int, int]]
    given: bool = False
    ended: bool = False
    complete: bool = False


@dataclass
class Seen:
    """What was found. empty, left_out: (record, message) of each empty turn, records by the part that the template leaves out."""

    answers: int = 0
    empty: list[tuple[int, int]] = field(default_factory=list)
    left_out: dict[str, list[int]] = field(default_factory=dict)


class _Shape(NamedTuple):
    """How a template writes plain conversations of the same roles. whole: whether the answers stand in them as at use. pieces:
    what stands around the contents; spans: where answers begin and end, in the text of the probe; ends, lengths: of its contents in it."""

    whole: bool
    pieces: list[str]
    spans: Spans
    ends: list[int]
    lengths: list[int]


class Turns:
    """Renders conversations. turns: data.turns. last_turn, roles: data.train_on. end: what ends a turn, found by a probe, or ""."""

    def __init__(
        self, tokenizer: Any, tokens: TextTokens, turns: str = "auto", last_turn: bool = False, roles: Sequence[str] = ("assistant",)
    ) -> None:
        self._tokenizer, self._tokens, self._turns = tokenizer, tokens, turns
        self._last_turn, self._roles = last_turn or turns == "last", frozenset(roles)
        self._shapes: dict[tuple[bool, tuple[str, ...]], _Shape | None] = {}
        self.seen = Seen()
        self.end = self._probed_end()  # first of all: it reports a template that is broken
        self._touchy, self._source = chat.spelled(tokenizer), chat.sources(tokenizer)
        self.end_token = tokens.control_at(self.end)
        forms: Iterator[tuple[bool, Message]] = product((False, True), ({}, {"content": None}, {"content": ""}))
        self._calls = next((form for form in forms if self._writes_calls(*form)), (False, {"content": ""}))

    def asked(self, talk: Conversation, index: int, source: str) -> list[int]:
        """The messages of record number `index` that are answers to train on. Raises UserError for a conversation that begins with one."""
        opened = next((m["role"] for m in talk.messages if m["role"] not in ("system", "developer")), None)
        if opened == "assistant":
            raise UserError(
                f"{source}, record {index}: it begins with the assistant's turn, which nothing asks for: remove that message, or make it "
                "one of the system"
            )
        found = []
        for number, (message, trained) in enumerate(zip(talk.messages, talk.trained, strict=True)):
            calls = message.get("tool_calls") and "tool_calls" in self._source  # else the template writes an answer that says nothing
            if blank(message.get("content", "")) and not calls and message["role"] != "tool":
                self.seen.empty.append((index, number))
            elif message["role"] in self._roles and trained:
                found.append(number)
        return found[-1:] if self._last_turn else found

    def samples(self, talk: Conversation, asked: list[int], index: int, source: str, split: bool = False) -> list[Sample]:
        """One of the whole conversation, or one for each answer, as at use: where the whole does not have the answers as they are then, by
        data.turns, or by `split`. Raises UserError where the template refuses the conversation."""
        where = f"{source}, record {index}"
        messages = [self.guarded(message) for message in talk.messages]
        tools = None if talk.tools is None else [_mapped(tool, self._tokens.guard) for tool in talk.tools]
        if self._turns in ("auto", "whole") and not split:
            whole = self._whole(messages, tools, asked, where)
            if whole is not None:
                return [whole]
        others = sorted({messages[number]["role"] for number in asked} - {"assistant"})
        if others:
            raise UserError(
                f"{where}: the chat template writes an answer otherwise in the whole conversation than at use, and data.train_on.roles has "
                f"{others[0]!r}, whose messages are trained on in the whole alone: set data.turns=whole, or leave {others[0]!r} out"
            )
        return [self._by_itself(messages[: number + 1], tools, where) for number in asked]

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None, where: str) -> str:
        """What stands before the assistant's next turn, as in training."""
        guarded = [self.guarded(message) for message in messages]
        return self._write(guarded, None if tools is None else [_mapped(tool, self._tokens.guard) for tool in tools], True, where)[0]

    def guarded(self, message: Message) -> Message:
        """With its control tokens as text, but for the tags in which an assistant thinks and calls tools."""
        own = message["role"] == "assistant"

        def guard(text: str) -> str:
            return self._tokens.guard(text, own=own)

        # What the template has no word for (ids, dates) is left out, so that such messages are plain.
        known = {key: value for key, value in message.items() if key in _KEPT or key in self._source}
        if message.get("tool_calls"):
            known = _called(known, *self._calls)
        return {key: value if key == "role" else _mapped(value, guard) for key, value in known.items()}

    def note_left_out(self, talk: Conversation, asked: list[int], samples: list[Sample], index: int) -> None:
        """Count what of a conversation stands in none of its samples: a part that the template leaves out without a word."""
        if all(sample.complete for sample in samples):
            return
        texts = [chat.bare(self._tokens.shown(sample.text)) for sample in samples]
        own = dict(zip(asked, texts, strict=True)) if len(texts) == len(asked) else {}
        ended = samples[-1].spans[-1][1] == len(samples[-1].text)  # with an answer: what follows it is in none
        for kind, number, part in _parts(talk):
            text = own.get(number, texts[-1])
            if number <= asked[-1] or not ended:
                spelled = (part, json.dumps(part, ensure_ascii=False)[1:-1])
                if not any(chat.bare(each) in text for each in spelled) and self.seen.left_out.setdefault(kind, [index])[-1] != index:
                    self.seen.left_out[kind].append(index)

    def _write(self, messages: Sequence[Message], tools: Any, ask: bool, where: str) -> tuple[str, list[tuple[int, int]]]:
        roles = ", ".join(message["role"] for message in messages[:8]) + (" …" if len(messages) > 8 else "")
        return chat.marked(self._tokenizer, messages, ask, tools, where, f"Its roles are {roles or '(none)'}. {_ADVICE}")

    def _writes_calls(self, spelled: bool, empty: Message) -> bool:
        """Whether the template writes a tool call in the form that `_called` gives it."""
        calls = [{"type": "function", "id": "qzx000000", "function": {"name": "qzx1xzq", "arguments": {"a": "qzx2xzq"}}}]
        call = _called({"role": "assistant", "tool_calls": calls}, spelled, empty)
        messages = [{"role": "user", "content": _PROBE[0]}, call, {"role": "tool", "content": _PROBE[2], "tool_call_id": calls[0]["id"]}]
        try:
            text = self._write(messages, None, False, "")[0] if "tool_calls" in self._source else ""
        except UserError:
            return False
        return "qzx1xzq" in text and "qzx2xzq" in text

    def _probed_end(self) -> str:
        """What follows an answer in the middle of a conversation and at its end alike; where that is nothing (harmony), at its end."""
        probe = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(_PROBE)]
        try:
            text = self._write(probe, None, False, "")[0]
        except UserError:
            return chat.end_of_turn(self._tokenizer)
        _, first, rest = text.partition(_PROBE[1])
        middle, last = rest.partition(_PROBE[2])[0], text.rpartition(_PROBE[3])[2]
        if not first:
            return chat.end_of_turn(self._tokenizer)
        same = next((at for at, (a, b) in enumerate(zip_longest(middle, last)) if a != b), len(last))
        if same < len(last):
            # Two control tokens may begin alike, or one like the text that follows.
            controls = self._tokens.controls_in(last)
            cut = next((begin for end, begin in controls if begin <= same < end), 0)
            same = max((end for end, _ in controls if end <= same), default=cut)
        return (last[:same] if last[:same].strip() else last).strip()

    def _end(self, text: str, begin: int) -> int:
        """Where a turn ends whose answer begins there, in a text that ends with it: behind the mark, without white space."""
        at = text.rfind(self.end, begin) if self.end else -1
        return at + len(self.end) if at >= 0 else max(len(text.rstrip()), begin)

    def _whole(self, messages: list[Message], tools: Any, asked: list[int], where: str) -> Sample | None:
        """None where an answer, or what stands before it, is another one in the whole than at use."""
        shape = self._shape(messages, tools, where, last=False)
        if shape is not None:
            if not shape.whole:
                return None
            found = self._filled(shape, messages, where)
            if found is not None:
                return self._ended(found[0], [found[1][number] for number in asked], messages, asked)._replace(complete=True)
        text, given = self._write(messages, tools, False, where)
        if chat.gives_spans(self._tokenizer, tools):
            return Sample(text, self._given(given, messages, asked, where), given=True)
        spans = self._spans(text, messages, tools, asked, where)
        return None if spans is None else self._ended(text, [spans[number] for number in asked], messages, asked)

    def _spans(self, text: str, messages: list[Message], tools: Any, asked: Sequence[int], where: str) -> Spans | None:
        spans = {}
        for number in asked:
            if messages[number]["role"] != "assistant":
                spans[number] = self._of_another(text, messages[: number + 1], tools, where)
                continue
            prompt = self._write(messages[:number], tools, True, where)[0]
            upto = text if number == len(messages) - 1 else self._write(messages[: number + 1], tools, False, where)[0]
            end = self._end(upto, len(prompt))
            closed = upto == self._at_use(prompt, upto, messages[: number + 1], tools, where)
            if closed and text.startswith(upto[:end]) and end > len(prompt):
                spans[number] = (len(prompt), end)
            elif self._turns == "whole":
                spans[number] = self._as_it_stands(text, prompt, messages[:number], tools, where)
            else:
                return None
        return spans

    def _of_another(self, text: str, messages: list[Message], tools: Any, where: str) -> tuple[int, int]:
        """What a message of another role says: behind its header, which is what it shares with one that says something else."""
        other = [*messages[:-1], {"role": messages[-1]["role"], "content": _OTHER}]
        upto, without = self._write(messages, tools, False, where)[0], self._write(other, tools, False, where)[0]
        begin = next((at for at, (a, b) in enumerate(zip(upto, without, strict=False)) if a != b), 0)
        end = self._end(upto, begin)
        if not begin or not text.startswith(upto[:end]):
            raise UserError(
                f"{where}: data.train_on.roles: where message {len(messages) - 1} stands in what the chat template writes is not known: "
                f"leave {messages[-1]['role']!r} out of data.train_on.roles"
            )
        return begin, end

    def _as_it_stands(self, text: str, prompt: str, before: list[Message], tools: Any, where: str) -> tuple[int, int]:
        """An answer in a text that has not all of its prompt, for data.turns = whole."""
        begin = next((at for at, (a, b) in enumerate(zip(text, prompt, strict=False)) if a != b), min(len(text), len(prompt)))
        end = text.find(self.end, begin) if self.end else -1
        if end < 0 or begin < len(self._write(before, tools, False, where)[0].rstrip()):
            raise UserError(
                f"{where}: data.turns = whole, but the chat template writes message {len(before)} otherwise in the whole conversation than "
                "at use, and where it begins there is not known: use data.turns = auto, split or last"
            )
        return begin, end + len(self.end)

    def _given(self, spans: list[tuple[int, int]], messages: list[Message], asked: list[int], where: str) -> list[tuple[int, int]]:
        """Those of a template's own spans that are asked for."""
        if not any(end > begin for begin, end in spans):
            raise UserError(
                f"{where}: its chat template has {{% generation %}}, and marks nothing of this conversation as the assistant's: mend the "
                "template, or use another one (data.template = chatml or mistral)"
            )
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if len(spans) == len(answers):
            return [span for number, span in zip(answers, spans, strict=True) if number in asked]
        if answers == asked:
            return spans
        raise UserError(
            f"{where}: its chat template marks {len(spans)} parts of {len(answers)} answers as the assistant's, so which of them not to "
            "train on is not known: remove weight, train and data.train_on, or set data.turns=split"
        )

    def _by_itself(self, messages: list[Message], tools: Any, where: str) -> Sample:
        """The last message as at use: behind its prompt."""
        shape = self._shape(messages, tools, where, last=True)
        found = None if shape is None else self._filled(shape, messages, where)
        text, spans = found or self._last(messages, tools, where)
        number = len(messages) - 1
        begin, end = spans[number]
        return self._ended(text[:end], [(begin, end)], messages, [number])._replace(complete=found is not None)

    def _last(self, messages: list[Message], tools: Any, where: str) -> tuple[str, Spans]:
        prompt, text = self._write(messages[:-1], tools, True, where)[0], self._write(messages, tools, False, where)[0]
        used = self._at_use(prompt, text, messages, tools, where) or self._moved(prompt, text, messages, tools, where)
        if used is None:
            raise UserError(
                f"{where}: what the chat template writes to ask for an answer ({prompt[-60:]!r} at its end) is not how it begins the same "
                f"turn with an answer ({text[max(0, len(prompt) - 60) : len(prompt) + 20]!r}): where the answer begins is not known. "
                "Use data.template_args (enable_thinking: true where answers think, false where they do not, if the template knows it), or "
                "another chat template"
            )
        return used, {len(messages) - 1: (len(prompt), self._end(used, len(prompt)))}

    def _at_use(self, prompt: str, text: str, messages: list[Message], tools: Any, where: str) -> str | None:
        """`text`, which is what the template makes of these messages, as it is at use behind the prompt of the last."""
        last = messages[-1]

        def write(other: str | None) -> str:
            bare = {key: value for key, value in last.items() if key not in ("reasoning_content", "thinking")}
            bare |= {"content": other} if other else {}
            return text if other is None else self._write([*messages[:-1], bare], tools, False, where)[0]

        return chat.at_use(prompt, write, last.get("content") or "", last.get("reasoning_content", ""))

    def _moved(self, prompt: str, text: str, messages: list[Message], tools: Any, where: str) -> str | None:
        """The prompt and the answer behind it, where the template writes something else before the two in `text` than at use (Mistral's
        system prompt stands in the last question alone). None where it is not behind the same header, or without one the same question."""
        other = [*messages[:-1], messages[-1] | {"content": _OTHER}]
        without, asked = self._write(other, tools, False, where)[0], (messages[-2].get("content") or "").strip()
        header = prompt.removeprefix(self._write(messages[:-1], tools, False, where)[0])
        header = "" if header == prompt else header.strip()
        begin = next((at for at, (a, b) in enumerate(zip(text, without, strict=False)) if a != b), 0)
        for at in range(begin, len(text[:begin].rstrip()) - 1, -1):  # white space before an answer is its own
            pairs = zip(reversed(prompt), reversed(text[:at]), strict=False)
            same = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(prompt), at))
            if (header or asked) and (header or asked) in prompt[len(prompt) - same :]:
                return prompt + text[at:]
        return None

    def _ended(self, text: str, spans: list[tuple[int, int]], messages: list[Message], asked: list[int]) -> Sample:
        if self.end_token is None and asked[-1] == len(messages) - 1:
            return Sample(text[: spans[-1][1]], spans, ended=True)
        return Sample(text, spans)

    def _shape(self, messages: list[Message], tools: Any, where: str, last: bool) -> _Shape | None:
        """Of conversations of these roles; None for one that is not plain: the template may look at more than its roles."""
        if tools or chat.gives_spans(self._tokenizer, tools) or not all(self._plain(message) for message in messages):
            return None
        key = last, tuple(message["role"] for message in messages)
        if key not in self._shapes:
            try:
                self._shapes[key] = self._probed(messages, where, last)
            except UserError:  # the conversation itself says what is wrong, in its own words
                self._shapes[key] = None
        return self._shapes[key]

    def _plain(self, message: Message) -> bool:
        content = message.get("content", "")
        return bool(content) and len(message) == 2 and content == content.strip() and not self._touchy.search(content)

    def _probed(self, messages: list[Message], where: str, last: bool) -> _Shape | None:
        contents = [f"qzx{number}xzq" for number in range(len(messages))]
        probe = [{"role": message["role"], "content": content} for message, content in zip(messages, contents, strict=True)]
        spans: Spans | None
        if last:
            text, spans = self._last(probe, None, where)
            if text != self._write(probe, None, False, where)[0]:
                return None
        else:
            text = self._write(probe, None, False, where)[0]
            spans = self._spans(text, probe, None, [n for n, m in enumerate(probe) if m["role"] in self._roles], where)
        pieces, at, ends = [], 0, []
        for content in contents:
            begin = text.find(content, at)
            if begin < 0 or text.count(content) != 1:
                return None
            pieces.append(text[at:begin])
            at = begin + len(content)
            ends.append(at)
        return _Shape(spans is not None, [*pieces, text[at:]], spans or {}, ends, list(map(len, contents)))

    def _filled(self, shape: _Shape, messages: list[Message], where: str) -> tuple[str, Spans] | None:
        """The text of a conversation of this shape, and its answers; None where the template writes something else for it."""
        contents = [message["content"] for message in messages]
        text = self._write(messages, None, False, where)[0]
        if text != "".join(chain.from_iterable(zip_longest(shape.pieces, contents, fillvalue=""))):
            return None
        longer = [0, *accumulate(len(content) - length for content, length in zip(contents, shape.lengths, strict=True))]

        def place(probe: int) -> int:
            return probe + longer[bisect_right(shape.ends, probe)]

        return text, {number: (place(begin), place(end)) for number, (begin, end) in shape.spans.items()}


def _called(message: Message, spelled: bool, empty: Message) -> Message:
    """A message with tool calls in the form that a template takes. spelled: their arguments as JSON's text; empty: in the place of a
    content that says nothing."""
    said = {"content": message["content"]} if message.get("content", "").strip() else empty
    calls = message["tool_calls"]
    if spelled:
        told = [json.dumps(call["function"]["arguments"], ensure_ascii=False) for call in calls]
        calls = [call | {"function": call["function"] | {"arguments": text}} for call, text in zip(calls, told, strict=True)]
    return {key: value for key, value in message.items() if key != "content"} | said | {"tool_calls": calls}


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A value with every text in it changed, keys of objects too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _mapped(inner, change) for key, inner in value.items()}
    return [_mapped(inner, change) for inner in value] if isinstance(value, list | tuple) else value


def _parts(talk: Conversation) -> list[tuple[str, int, str]]:
    """(what it is, message, text) of everything in a conversation that a template may leave out."""
    found = []
    for number, message in enumerate(talk.messages):
        role = message["role"]
        found.append((_KINDS.get(role, f"{role} messages"), number, message.get("content", "")))
        found.append(("thinking", number, message.get("reasoning_content", "")))
        for call in message.get("tool_calls", ()):
            found += [("tool calls", number, text) for text in (call["function"]["name"], *texts_in(call["function"]["arguments"]))]
    for tool in talk.tools or ():
        function = tool.get("function", tool)
        found += [("tools", 0, function.get(key)) for key in ("name", "description")]
    return [part for part in found if part[2] and isinstance(part[2], str)]
