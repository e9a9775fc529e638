"""Preferences: two answers to the same prompt, in the shapes in which people write them, made two conversations."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from moejax.data import conversation
from moejax.data.columns import Columns
from moejax.data.conversation import Conversation
from moejax.errors import UserError

SIDES = ("chosen", "rejected")
_ASK = "a preference is between two answers to the same prompt: mend the record or leave it out"
_SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_OPEN = {"from": "assistant", "value": ""}  # how a prompt ends that is a transcript

_ADVICE = (
    "there is nothing to prefer; give them another rejected answer, or leave them out",
    "give it one, or leave them out",
    "raise data.max_length, or shorten their prompts",
)  # of what `Refused` notes


class Pair(NamedTuple):
    """Both sides as whole conversations. Nothing of the prompt is `trained`."""

    chosen: Conversation
    rejected: Conversation


@dataclass
class Refused:
    """Records of pairs that say nothing: `equal` sides; `empty`: a side without an answer; `emptied`: one that the cut at data.max_length
    leaves without."""

    equal: list[int] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)
    emptied: list[int] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.equal) + len(self.empty) + len(self.emptied)

    def noted(self) -> dict[str, Sequence[int]]:
        """The records by what is wrong with them."""
        return {"equal sides": self.equal, "a side without an answer": self.empty, "a side cut off at data.max_length": self.emptied}

    def notes(self, files: Mapping[str, str]) -> list[str]:
        """What a user should know of them. files: what says of a kind in which file its first is, where there are several."""
        found = []
        for (what, records), advice in zip(self.noted().items(), _ADVICE, strict=True):
            if records:
                pairs = f"{len(records):,} pair{' has' if len(records) == 1 else 's have'}"
                found.append(f"{pairs} {what} (first: {files.get(what, '')}record {records[0]}): dropped; {advice}")
        return found


def read_pair(record: dict[str, Any], columns: Columns, where: str) -> Pair:
    """Both sides of a record: texts, messages, or one message; with their prompt in a column of its own (a text, messages, or OpenAI's
    object of messages and tools), or as whole conversations, messages or hh-rlhf's transcripts, whose prompt are the messages that they
    begin with alike (TRL's `extract_prompt`). where: begins every error.

    Raises UserError for a side that is missing, a prompt that is, and sides whose prompts differ.
    """
    alongside = {str(key).strip().lower(): value for key, value in record.items()}
    system = alongside.get("system") or alongside.get("system_prompt")
    asked: Any = _asked(record, columns)
    tools: Any = alongside.get("tools")
    if isinstance(asked, dict):
        asked, tools = asked.get("messages"), asked.get("tools", tools)
    sides: list[Conversation] = []
    begins: list[int] = []
    for side, column in zip(SIDES, (columns.chosen, columns.rejected), strict=True):
        value = _messages(record.get(str(column)))
        said = _turns(value) if isinstance(value, str) else None
        if said is not None and (asked is None or _repeats(said, asked)):
            value = said
        if value is None:
            has = ", ".join(str(key) for key, found in record.items() if found is not None) or "nothing"
            raise UserError(
                f"{where}: no {side} answer under {column!r} (it has {has}): `preference` trains on both sides: add it, or leave the "
                "record out"
            )
        if isinstance(value, dict):
            value = [value]
        if not isinstance(value, str | list):
            raise UserError(f"{where}: {column!r}: expected a text, a message or a list of messages, got {str(value)[:40]!r}")
        prompt = None if isinstance(asked, str) and _whole(value) else asked
        if isinstance(prompt, str) and isinstance(value, str) and (turns := _turns(prompt)):
            prompt, value = turns[: -1 if turns[-1] == _OPEN else None], value.strip()
        if prompt is None and not _whole(value):
            raise UserError(
                f"{where}: no prompt (it has {', '.join(map(str, record))}): expected a prompt, question or instruction, the messages "
                "before the answers under messages or conversations, or whole conversations as chosen and rejected; "
                "data.fields='{instruction: COLUMN}' or '{messages: COLUMN}' names the prompt's column"
            )
        given = {"prompt": prompt, "chosen": value, "system": system, "tools": tools}
        talk = conversation.read(given, f"{where}, {side}")
        assert talk is not None
        begins.append(_length(prompt, talk))
        if not _answers(asked, talk, begins[-1]):
            raise UserError(
                f"{where}: {column!r} is a conversation that asks something else than the record's prompt: expected an answer alone, or a "
                "conversation that begins with the prompt"
            )
        sides.append(talk)
    first = min(*begins, _shared(sides[0].messages, sides[1].messages, where))
    return Pair(*(talk._replace(trained=tuple(on and n >= first for n, on in enumerate(talk.trained))) for talk in sides))


def _answers(asked: Any, talk: Conversation, length: int) -> bool:
    """Whether a side continues from its prompt of `length` messages. A whole conversation has a prompt that is a text in one of its
    messages, or one of them in the text."""
    if isinstance(asked, str):
        others = [message.get("content", "").strip() for message in talk.messages if message["role"] != "assistant"]
        return not asked.strip() or any(text in asked or asked.strip() in text for text in others if text)
    return length >= len(talk.messages) or [message["role"] for message in talk.messages[length - 1 : length + 1]] != ["user", "user"]


def _length(prompt: Any, talk: Conversation) -> int:
    """Of how many messages of a conversation the prompt is, where it is known apart; else all of them."""
    if prompt is None:
        return len(talk.messages)
    asked = [] if isinstance(prompt, str) else prompt
    system = talk.messages[0]["role"] == "system" and not (asked and conversation.role_of(asked[0]) == "system")
    return max(len(asked), 1) + system


def _asked(record: dict[str, Any], columns: Columns) -> Any:
    """The prompt, a text or messages, or None. A question's context stands behind it, as of questions and answers."""
    asked = _messages(record.get(columns.messages or columns.instruction or ""))
    context = record.get(columns.input or "")
    return f"{asked}\n{context}" if isinstance(asked, str) and isinstance(context, str) and context else asked


def _messages(value: Any) -> Any:
    """The messages of a cell of a table that holds them as JSON; all else as it stands."""
    if isinstance(value, str) and re.match(r"\s*\[\s*\{", value):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _turns(text: str) -> list[dict[str, str]] | None:
    """The messages of a transcript as of hh-rlhf: paragraphs that begin with Human: or Assistant:, the first with Human:. Else None."""
    before, *parts = _SPEAKER.split(text.replace("\r\n", "\n").strip())
    if before or parts[:1] != ["Human"]:
        return None
    return [{"from": who.lower(), "value": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def _repeats(turns: list[dict[str, str]], asked: Any) -> bool:
    """Whether a transcript begins as the record's prompt does, a text: else it is an answer that happens to look like one."""
    return isinstance(asked, str) and turns[0]["value"] in (asked.strip(), (_turns(asked) or turns[1:] or [_OPEN])[0]["value"])


def _whole(side: str | list[Any]) -> bool:
    """Whether it begins with what was asked: messages of which the first is not the assistant's."""
    if isinstance(side, str) or not side or not isinstance(side[0], dict):
        return False
    return conversation.role_of(side[0]) != "assistant"


def _shared(chosen: Sequence[Any], rejected: Sequence[Any], where: str) -> int:
    """How many messages both begin with. Raises UserError where what differs first is no answer."""
    shorter = min(len(chosen), len(rejected))
    begins = next((n for n in range(shorter) if chosen[n] != rejected[n]), shorter)
    others = [(side, talk[begins]["role"]) for side, talk in zip(SIDES, (chosen, rejected), strict=True) if begins < len(talk)]
    for side, role in others:
        if role != "assistant" and len(others) == 2:
            raise UserError(f"{where}: chosen and rejected differ first at message {begins}, in {side} of the role {role!r}: {_ASK}")
    return begins
