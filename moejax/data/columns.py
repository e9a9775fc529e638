"""Which columns of a source are trained on: named in data.fields, or known by their names. One table of names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from moejax.config_sources import FieldNames
from moejax.data import conversation
from moejax.errors import UserError

PAIRS = (
    ("instruction", "output"), ("instruction", "response"), ("instruction", "completion"), ("instruction", "answer"),
    ("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("question", "response"), ("query", "response"),
    ("query", "answer"), ("problem", "solution"), ("input", "output"),
)  # fmt: skip
PROMPTS = ("prompt", "question", "instruction", "query", "problem")  # what two answers of a preference answer
PAIRS_OF_ANSWERS = (("chosen", "rejected"), ("preferred_output", "non_preferred_output"))  # the second: OpenAI's names
CONTEXTS = ("input", "context")  # what a question is about: read next to it where it is there
TEXTS = ("text", "content", "document")
_ANSWERS = tuple(dict.fromkeys(answer for _, answer in PAIRS))
_QUESTIONS = tuple(dict.fromkeys(question for question, _ in PAIRS))
NAMED = (
    "data.fields='{instruction: QUESTIONS, output: ANSWERS}' names other columns; a conversation lies under messages or conversations, or "
    "data.fields='{messages: COLUMN}' names it"
)


class Columns(NamedTuple):
    """The names of a source's columns. Of four kinds one is there: text; messages; instruction and output, with input where there is one;
    chosen and rejected, with instruction (and input) or messages where they do not repeat their prompt.

    others: columns that are not read. named: by data.fields, and not found by their names.
    """

    instruction: str | None = None
    input: str | None = None
    output: str | None = None
    text: str | None = None
    messages: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    others: tuple[str, ...] = ()
    named: bool = False

    @property
    def needed(self) -> tuple[str, ...]:
        """Those that every record has."""
        several = (self.instruction, self.output, self.text, self.messages, self.chosen, self.rejected)
        return tuple(name for name in several if name is not None)

    @property
    def kind(self) -> str:
        """What a record is."""
        if self.chosen:
            return "a preference"
        return "a conversation" if self.messages else "a whole text" if self.text else "a question and its answer"

    @property
    def read(self) -> str:
        """Which they are."""
        return ", ".join(f"{part}: {name!r}" for part, name in self._asdict().items() if part not in ("others", "named") and name)

    def told(self) -> str:
        """The same for a note, with those that are not read."""
        rest = f"; not read: {', '.join(map(shown, self.others[:6]))}{' …' * (len(self.others) > 6)}" if self.others else ""
        return f"{self.read} ({'data.fields' if self.named else 'by name; data.fields names others'}){rest}"


def find(where: str, record: Any, keys: Iterable[Any], fields: FieldNames, template: str | None) -> Columns:
    """The columns of the source whose first record this is; where: it, for messages; keys: of all its records.

    Names are known in any case (`Question`). Raises UserError, with the columns found and how to name them, where none is known or several
    could be meant.
    """
    if not isinstance(record, dict):
        return Columns("instruction", None, "output", "text")  # anyone who judges the record says what it is
    known, known_in_any = _knower(where, record), _knower(where, keys)
    if template == "text":
        found = [fields.text] if fields.text else [column for name in TEXTS if (column := known(name))]
        if not found:
            raise UserError(
                f"{where}: no column of whole texts is known by its name ({', '.join(TEXTS)}): it has {_listed(record)}; "
                "data.fields='{text: COLUMN}' names it"
            )
        return _made(record, fields, text=found[0])
    if fields.messages:
        return _made(record, fields, messages=fields.messages)
    if fields.instruction or fields.output:
        question, answer = _other_half(where, record, fields, known)
    else:
        listed = next((column for name in conversation.LISTS if (column := known(name))), None)
        talk = conversation.key_of(record)

        def texts(*names: str) -> bool:
            """Whether all of these are: then they are a question and its answer, whatever else the record has."""
            return all(isinstance(record.get(known(name)), str) for name in names)

        if talk is not None and not texts("instruction", "output") and not (talk == "completion" and texts("prompt", "completion")):
            return _made(record, fields, messages=known(talk))
        other = listed is not None and not isinstance(record[listed], str)
        if other and not any(known(question) and known(answer) for question, answer in PAIRS):
            return _made(record, fields, messages=listed)  # anyone who judges the record says that it is null, or an object
        question, answer = _pair(where, record, known)
    context = fields.input or next((c for name in CONTEXTS if (c := known_in_any(name)) and c not in (question, answer)), None)
    return _made(record, fields, instruction=question, input=context, output=answer)


def find_pairs(where: str, record: Any, keys: Iterable[Any], fields: FieldNames) -> Columns:
    """The same of preferences: the columns of both answers, and of what they answer where it is apart from them."""
    if not isinstance(record, dict):
        return Columns(chosen="chosen", rejected="rejected")
    known, known_in_any = _knower(where, record), _knower(where, keys)
    usual, openai = PAIRS_OF_ANSWERS
    chosen = fields.chosen or known(usual[0]) or known(openai[0])
    rejected = fields.rejected or known(usual[1]) or known(openai[1])
    lacking = [column or name for name, column in (("chosen", chosen), ("rejected", rejected)) if column not in record]
    if lacking:
        raise UserError(
            f"{where}: `preference` trains on pairs of answers, and no column {lacking[0]!r} is there: it has {_listed(record)}; "
            "data.fields='{chosen: COLUMN, rejected: COLUMN}' names others; without the section `preference` answers alone are trained on"
        )
    asked = fields.instruction or (None if fields.messages else next((c for name in PROMPTS if (c := known(name))), None))
    talk = None if asked else fields.messages or next((c for name in conversation.LISTS if (c := known(name))), None)
    if asked is None and talk is None and isinstance(record.get(known("input") or ""), dict):
        talk = known("input")  # OpenAI's: {"messages": […], "tools": […]}
    context = fields.input or (next((c for name in CONTEXTS if (c := known_in_any(name))), None) if asked else None)
    return _made(record, fields, instruction=asked, input=context, messages=talk, chosen=chosen, rejected=rejected)


def _knower(where: str, columns: Iterable[Any]) -> Callable[[str], str | None]:
    """A function from a known name to the column that is called so, in any case."""
    found: dict[str, list[str]] = {}
    for column in columns:
        found.setdefault(str(column).strip().lower(), []).append(str(column))

    def known(name: str) -> str | None:
        spelled = found.get(name, ())
        if len(spelled) > 1 and name not in spelled:
            raise UserError(f"{where}: {' and '.join(map(repr, spelled))} could each be its {name!r}: {NAMED}")
        return None if not spelled else name if name in spelled else spelled[0]

    return known


def _made(record: dict[str, Any], fields: FieldNames, **parts: str | None) -> Columns:
    named = any(value is not None for value in fields.model_dump().values())
    along = conversation.ALONGSIDE if parts.get("messages") or parts.get("chosen") else ()
    others = (name for name in map(str, record) if name not in parts.values() and name.strip().lower() not in along)
    return Columns(**parts, others=tuple(others), named=named)


def _pair(where: str, record: dict[str, Any], known: Any) -> tuple[str, str]:
    """The columns of questions and answers by their names."""
    there = [(question, answer) for question, answer in PAIRS if known(question) and known(answer)]
    if ("instruction", "output") in there:  # the form of the studies: whatever else is next to it (`answer` is what is scored)
        there = [("instruction", "output")]
    if len(there) > 1:
        there = [pair for pair in there if pair[0] != "input"]  # the context of another question
    if len(there) == 1:
        return known(there[0][0]), known(there[0][1])
    if there:
        raise UserError(
            f"{where}: several columns could be meant ({', '.join('/'.join(pair) for pair in there)}): name those that are trained on, "
            f"data.fields='{{instruction: {known(there[0][0])}, output: {known(there[0][1])}}}'"
        )
    pairs = ", ".join("/".join(pair) for pair in PAIRS)
    whole = next((column for name in TEXTS if (column := known(name))), None)
    hint = "" if whole is None else f"; data.template=text trains on the whole of {whole!r}"
    if (known("role") and known("content")) or (known("from") and known("value")):
        hint = '; these are the messages of one conversation: write [{"messages": […]}]'
    raise UserError(
        f"{where}: no columns of questions and answers are known by their names ({pairs}), and no messages: it has {_listed(record)}; "
        f"{NAMED}{hint}"
    )


def _other_half(where: str, record: dict[str, Any], fields: FieldNames, known: Any) -> tuple[str, str]:
    """Where one of the two is named, the other by its name."""
    if fields.instruction and fields.output:
        return fields.instruction, fields.output
    given, names, part = (fields.instruction, _ANSWERS, "output") if fields.instruction else (fields.output, _QUESTIONS, "instruction")
    found = [column for name in names if (column := known(name)) and column != given]
    found = found[:1] if known("output") in found[:1] or known("instruction") in found[:1] else found
    if len(found) != 1:
        what = f"several could be ({', '.join(found)})" if found else f"it has {_listed(record)}"
        raise UserError(f"{where}: data.fields names {given!r} and not the column of {part}: {what}; {NAMED}")
    return (str(given), found[0]) if fields.instruction else (found[0], str(given))


def _listed(record: dict[str, Any]) -> str:
    return ", ".join(map(shown, record)) or "no columns"


def shown(key: Any) -> str:
    return str(key) if str(key) and str(key) == str(key).strip() else repr(key)
