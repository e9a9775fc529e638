"""Conversations: the shapes in which people write them, distinguished by their keys and made one.

Every shape becomes OpenAI's: messages with role and content, tool_calls whose arguments are objects, and reasoning_content. That is done
here and not left to a version of `transformers`, whose own clean-up differs between versions (nulls, `arguments`, names of the thinking).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from textwrap import shorten
from typing import Any, NamedTuple

from moejax.data.parsing import Repeated, Unread
from moejax.errors import UserError

Message = dict[str, Any]

LISTS = ("messages", "conversations", "conversation")  # keys under which a whole conversation lies
ALONGSIDE = ("prompt", "tools", "functions", "system", "system_prompt")  # keys of the same record that belong to it
KEYS = frozenset((*LISTS, "completion", "chosen", *ALONGSIDE))  # known in any case
ROLES = ("system", "developer", "user", "assistant", "tool")
_ROLE = {
    "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "bot": "assistant", "model": "assistant", "ai": "assistant", "function_call": "assistant", "tool_call": "assistant",
    "function": "tool", "observation": "tool", "function_response": "tool", "tool_response": "tool", "ipython": "tool",
}  # fmt: skip
_CALLS = ("function_call", "tool_call")  # ShareGPT's roles whose text is a call as JSON
_TEXT_PARTS = ("text", "input_text", "output_text")  # the last two: of OpenAI's Responses
_THINKING = ("reasoning_content", "thinking", "reasoning")
_KINDS = {type(None): "null", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object", bytes: "bytes"}
_SAYING = frozenset(("content", "value", "text", "tool_calls", "function_call", *_THINKING))
_OURS = _SAYING | {"role", "from", "weight", "train"}


class Conversation(NamedTuple):
    """messages: as OpenAI has them, without nulls, and what else they hold as it stands. tools: as JSON Schema, or None. trained: for
    each message False where its own `weight: 0` or `train: false` takes it out of the loss."""

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] | None
    trained: tuple[bool, ...]


def key_of(record: dict[str, Any]) -> str | None:
    """The key that makes a record a conversation, if any, as it is known: a list of messages, or a prompt with its completion or chosen
    answer."""
    record = _spelled(record)
    for key in LISTS:
        value = record.get(key)
        if isinstance(value, list) or (isinstance(value, str) and re.match(r"\s*\[\s*\{", value)):
            return key
    for key in ("completion", "chosen"):
        if isinstance(record.get(key), list) or (isinstance(record.get(key), str) and isinstance(record.get("prompt"), str | list)):
            return key
    return None


def _spelled(record: dict[str, Any]) -> dict[str, Any]:
    """With the keys of a conversation as they are known, where they stand in it in another case."""
    known = {key: spelled for key in record if (spelled := str(key).strip().lower()) in KEYS}
    if all(key == spelled for key, spelled in known.items()):
        return record
    made = Repeated({known[key]: record[key] for key in known if key == known[key] or known[key] not in record})
    made.keys_twice = frozenset(known.get(key, key) for key in getattr(record, "keys_twice", ()))
    return made


def read(record: dict[str, Any], where: str = "the record") -> Conversation | None:
    """The conversation of a record, or None where it is none by its keys.

    OpenAI's `messages` (role, content), ShareGPT's `conversations` (from, value), a `prompt` with its `completion` or `chosen` answer
    (texts or messages; `chosen` may be the whole conversation; of a preference the rejected side is not read); each with `tools` (a list,
    or one as JSON) and `system`, if any. where: begins every error. Raises UserError that names the message, what it is, and what is
    expected.
    """
    record = _spelled(record)
    key = key_of(record)
    if key is None:
        return None
    if isinstance(record, Repeated) and key in record.keys_twice:
        raise UserError(f"{where}: {key!r} stands in it twice")
    messages, trained = [], []
    for number, (message, role) in enumerate(_listed(record, key, where)):
        made, loss = _message(message, role, f"{where}, message {number}")
        messages.append(made)
        trained.append(loss)
    given = next((name for name in ("system", "system_prompt") if record.get(name)), None)  # a table fills the other with null
    system = "" if given is None else _content(record[given], f"{where}: {given!r}")
    first = messages[0] if messages and messages[0]["role"] in ("system", "developer") else None
    if first is not None and system.strip() not in ("", first.get("content", "").strip()):
        both = [repr(shorten(text, 40, placeholder=" …")) for text in (system, first.get("content", ""))]
        raise UserError(
            f"{where}: its {given!r} ({both[0]}) is another than what the system says in {key!r} ({both[1]}): remove one of them"
        )
    if first is None and system.strip():
        messages.insert(0, {"role": "system", "content": system})
        trained.insert(0, True)
    return Conversation(tuple(messages), _tools(record.get("tools") or record.get("functions"), where), tuple(trained))


def to_answer(record: dict[str, Any], where: str) -> Conversation:
    """A conversation whose next turn is the assistant's. Raises UserError as `read` does, and where the last one is."""
    talk = read(record, where)
    if talk is None or not talk.messages or talk.messages[-1]["role"] == "assistant":
        raise UserError(f"{where}: expected a conversation whose last message is to be answered, not an assistant's")
    return talk


def _listed(record: dict[str, Any], key: str, where: str) -> Iterable[tuple[Any, str | None]]:
    """The messages as they stand, each with the role that a bare text has."""
    value, what = record[key], f"{where}: {key!r}"
    if key in LISTS and isinstance(value, str):  # a cell of a table
        value = _json(value, what)
    answer, prompt = _side(value, "assistant", what), record.get("prompt")
    if key in LISTS or prompt is None:
        return answer
    asked = _side(prompt, "user", f"{where}: 'prompt'")
    return answer if _begins(asked, answer) else asked + answer


def _side(value: Any, role: str, what: str) -> list[tuple[Any, str | None]]:
    """A text, which is of that role, or a list of messages."""
    if isinstance(value, str):
        return [(value, role)]
    if not isinstance(value, list):
        raise UserError(f"{what}: expected a text or a list of messages, got {kind(value)}")
    found: list[tuple[Any, str | None]] = []
    for message in value:
        turn = isinstance(message, dict) and {"input", "output"} <= message.keys() and not {"role", "from"} & message.keys()
        found += [(message["input"], "user"), (message["output"], "assistant")] if turn else [(message, None)]
    return found


def _begins(asked: list[tuple[Any, str | None]], answer: list[tuple[Any, str | None]]) -> bool:
    """Whether the chosen side is a whole conversation that repeats its prompt, as preference files have it."""
    if len(answer) <= len(asked) or isinstance(answer[0][0], str):
        return False
    texts = [[m if isinstance(m, str) else m.get("content", m.get("value")) if isinstance(m, dict) else None for m, _ in side]
             for side in (asked, answer)]  # fmt: skip
    return texts[1][: len(asked)] == texts[0]


def kind(value: Any) -> str:
    """What a value is, for a message that expected another."""
    if isinstance(value, Unread):
        return f"cells without a value ({value.why})"
    return "a text" if isinstance(value, str) else "NaN" if value != value else _KINDS.get(type(value), f"a {type(value).__name__}")


def role_of(message: Message) -> Any:
    """The role that it names, by OpenAI's words where it is one of others'."""
    said = message.get("role") or message.get("from")
    spelled = said.strip().lower() if isinstance(said, str) else said
    return _ROLE.get(spelled, spelled) if isinstance(spelled, str) else spelled


def _message(message: Any, bare: str | None, where: str) -> tuple[Message, bool]:
    """One message in OpenAI's form, and whether the loss may be on it."""
    if bare is not None:
        return {"role": bare, "content": _content(message, where)}, True
    if not isinstance(message, dict):
        raise UserError(f"{where}: expected an object with role and content, got {kind(message)}")
    if isinstance(message, Repeated):
        raise UserError(f"{where}: {min(message.keys_twice)!r} stands in it twice")
    given = {key: value for key, value in message.items() if value is not None}
    said = given.get("role", given.get("from"))
    if not isinstance(said, str):
        has = ", ".join(map(str, given)) or "nothing"
        raise UserError(f"{where}: no 'role' (or 'from') in it (it has {has}): expected {', '.join(ROLES)}")
    spelled = said.strip().lower()
    role = _ROLE.get(spelled, spelled)
    if role not in ROLES:
        raise UserError(f"{where}: the role {said!r} is unknown: expected {', '.join(ROLES)} (or ShareGPT's human, gpt, …)")
    if not _SAYING & message.keys():
        raise UserError(f"{where}: no 'content' (or 'value', 'text') in it (it has {', '.join(map(str, message))})")
    content = next((given[key] for key in ("content", "value", "text") if key in given), None)
    made: Message = {"role": role}
    if isinstance(content, list):
        thoughts = [part["thinking"] for part in content if isinstance(part, dict) and part.get("thinking")]
        content = [part for part in content if not (isinstance(part, dict) and part.get("thinking"))]
        given |= {"thinking": "".join(_content(thought, where) for thought in thoughts)} if thoughts else {}
    if spelled in _CALLS:
        made["tool_calls"] = _calls(_content(content, where), where)
    elif content is not None:  # else the key is missing, as `transformers` has it: templates know that case
        made["content"] = _content(content, where)
    thinking = next((given[name] for name in _THINKING if given.get(name)), None)
    if thinking is not None:
        made |= dict.fromkeys(("reasoning_content", "thinking"), _content(thinking, where))  # the names that templates ask for
    if given.get("tool_calls"):
        made["tool_calls"] = _calls(given["tool_calls"], where)
    elif isinstance(given.get("function_call"), dict):  # OpenAI's older form
        made["tool_calls"] = _calls([given["function_call"]], where)
    made |= {key: value for key, value in given.items() if key not in _OURS}  # a template may know them
    return made, _in_loss(given, where)


def _content(value: Any, where: str) -> str:
    """A message's text; of a list of parts the texts, joined. Raises UserError for a part that is no text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise UserError(f"{where}: expected a text, got {kind(value)}")
    texts = []
    for part in value:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and (part.get("type") or "text") in _TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            got = part.get("type") if isinstance(part, dict) else kind(part)
            raise UserError(f"{where}: a part of it is no text but {got!r}: only text is trained on; leave the record or the part out")
    return "".join(texts)


def _calls(value: Any, where: str) -> list[Any]:
    """Tool calls as [{type: function, function: {name, arguments: object}}]; of a text, of its JSON."""
    value = _json(value, f"{where}: the tool call") if isinstance(value, str) else value
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{where}: a tool call without a name: expected {{name: …, arguments: {{…}}}}, got {str(call)[:60]!r}")
        arguments = function.get("arguments", function.get("parameters"))
        if isinstance(arguments, str):
            arguments = _json(arguments, f"{where}: the arguments of {function['name']!r}") if arguments.strip() else {}
        elif isinstance(arguments, dict):
            # Parquet gives all calls of a file the same keys, and null to those that a call does not have.
            arguments = {key: argument for key, argument in arguments.items() if argument is not None}
        made = {"type": "function", "function": {"name": function["name"], "arguments": {} if arguments is None else arguments}}
        if isinstance(call.get("id"), str):
            made["id"] = call["id"]
        calls.append(made)
    return calls


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{what}: expected JSON, got {text[:60]!r}") from None


def _tools(value: Any, where: str) -> tuple[Any, ...] | None:
    """The tools that a record declares, or None. A tool that is given as a function alone is put into OpenAI's form."""
    if isinstance(value, str):
        value = _json(value, f"{where}: 'tools'") if value.strip() else None
    if not value:
        return None
    if not isinstance(value, list):
        raise UserError(f"{where}: 'tools': expected a list, or one as JSON, got {kind(value)}")
    tools = []
    for tool in value:
        tool = _json(tool, f"{where}: 'tools'") if isinstance(tool, str) else tool
        if not isinstance(tool, dict):
            raise UserError(f"{where}: 'tools': expected objects, got {kind(tool)}")
        tool = _without_nulls(tool)
        tools.append(tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool})
    return tuple(tools)


def _without_nulls(value: Any) -> Any:
    """Without the keys that Parquet fills with null."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _in_loss(given: Message, where: str) -> bool:
    """By a message's own `weight` (0 or 1) or `train` (true or false)."""
    for key in ("weight", "train"):
        value = given.get(key)
        if value is None:
            continue
        if value not in (0, 1):
            raise UserError(f"{where}: {key} = {value!r}: expected 0 or 1 (or false, true): a turn is trained on, or not")
        if not value:
            return False
    return True
