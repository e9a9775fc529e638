"""What a record must be: texts where texts are expected, each of them Unicode; else it is refused by its number."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from typing import Any

from moejax.data.columns import NAMED, Columns, shown
from moejax.data.conversation import KEYS, LISTS, Conversation, kind, read
from moejax.data.parsing import Repeated
from moejax.data.preferences import read_pair
from moejax.errors import UserError

Record = dict[str, Any]
ADVICE = f"; {NAMED}"

_INVISIBLE = frozenset(("Cc", "Cf", "Zs", "Zl", "Zp"))  # control and format characters (zero-width ones), spaces
# Of no such category, and nothing is seen of them either: fillers, joiners, variation selectors.
_FILLERS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u2800\u3164\uffa0") | {chr(c) for c in range(0xFE00, 0xFE10)}


def judged(name: str, index: int, record: Any, columns: Columns) -> Record:
    """Record number `index` (from 0) of the file `name` with the keys instruction, input, output and answer, or text, or conversation;
    of a preference conversation (the chosen side) and rejected, another conversation.

    answer: as it stands, or None. Raises UserError that names file, record and field.
    """
    where = f"{name}, record {index}"
    if not isinstance(record, dict):
        hint = ': of a conversation\'s messages, write {"messages": […]}' if isinstance(record, list) else ""
        raise UserError(f"{where}: expected an object, got {kind(record)}{hint}")
    if columns.chosen is not None:
        return _preference(where, record, columns)
    if columns.messages is not None:
        return _talk(where, record, columns.messages)
    if columns.text is not None:
        return {"text": text_of(where, record, columns.text, ADVICE)}
    output = text_of(where, record, str(columns.output), ADVICE)
    return {
        "instruction": text_of(where, record, str(columns.instruction), ADVICE),
        "input": "" if columns.input is None or record.get(columns.input) is None else text_of(where, record, columns.input, ADVICE),
        "output": output,
        "answer": record.get("answer"),
    }


def _talk(where: str, record: Record, column: str) -> Record:
    """A conversation in `column`, which may be a name of the user's."""
    if column not in record:
        raise UserError(f"{where}: no conversation under {column!r} (it has {', '.join(map(shown, record)) or 'no keys'}){ADVICE}")
    known = column.strip().lower() in KEYS
    talk = read(record if known else {**record, LISTS[0]: record[column]}, where)
    if talk is None:
        raise UserError(f"{where}: no list of messages under {column!r}, but {kind(record[column])}{ADVICE}")
    _whole_characters(where, talk)
    return {"conversation": talk, "answer": record.get("answer")}


def _preference(where: str, record: Record, columns: Columns) -> Record:
    """Both sides of a pair."""
    twice = isinstance(record, Repeated) and sorted({str(name) for name in columns[:7]} & set(record.keys_twice))
    if twice:
        raise UserError(f"{where}: {twice[0]!r} stands in it twice")
    pair = read_pair(record, columns, where)
    for side, talk in zip(("chosen", "rejected"), pair, strict=True):
        _whole_characters(f"{where}, {side}", talk)
    return {"conversation": pair.chosen, "rejected": pair.rejected, "answer": record.get("answer")}


def _whole_characters(where: str, talk: Conversation) -> None:
    places = [(f"{where}, message {number}", message) for number, message in enumerate(talk.messages)]
    for place, value in [*places, (f"{where}: 'tools'", list(talk.tools or ()))]:
        for text in texts_in(value, 99, keys=True):
            unicode(place, text)


def text_of(where: str, record: Record, field: str, advice: str = "") -> str:
    """The text under `field`. Raises UserError where there is none, or two, or half a character in it."""
    if isinstance(record, Repeated) and field in record.keys_twice:
        raise UserError(f"{where}: {field!r} stands in it twice")
    if field not in record:
        raise UserError(f"{where}: no text under {field!r} (it has {', '.join(map(shown, record)) or 'no keys'}){advice}")
    value = record[field]
    if not isinstance(value, str):
        raise UserError(f"{where}: no text under {field!r}, but {kind(value)}{advice}")
    return unicode(f"{where}: {field!r}", value)


def unicode(what: str, text: str) -> str:
    """The text itself. Raises UserError where a character of it is none: half a surrogate pair, or a byte that was not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        at = text[error.start]
        why = "a byte that is not UTF-8" if "\udc80" <= at <= "\udcff" else "half of a surrogate pair, as of an emoji that was cut in two"
        raise UserError(f"{what} holds {why} ({at!a} at character {error.start}): mend it or leave it out") from None
    return text


def texts_in(value: Any, depth: int = 4, *, keys: bool = False) -> Iterator[str]:
    """The texts of a value, of its lists and objects, `depth` of them inside one another. keys: those of objects too."""
    if isinstance(value, str):
        yield value
    elif depth and isinstance(value, dict | list):
        if keys and isinstance(value, dict):
            yield from map(str, value)
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts_in(part, depth - 1, keys=keys)


def blank(text: str) -> bool:
    """Whether nothing of a text is seen: white space, zero-width and control characters, fillers."""
    return all(unicodedata.category(c) in _INVISIBLE or c in _FILLERS for c in text)
