"""Chat templates as `transformers` renders them, within bounds of time and size: a template from the Hub is somebody's program.

The same jinja2 environment as `apply_chat_template` has (sandboxed, its filters and globals, `{% generation %}`); tests compare the two.
What it does not have: a loop that does not end, a text that outgrows the memory, and a date that is another one tomorrow.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes

WORK = 4_000_000
"""Turns of loops, calls, and pieces of 256 characters made, of one rendering: a conversation of a thousand messages takes some 100,000."""
LARGEST = 16_000_000  # characters, or elements of a list
_OPEN, _CLOSE = "\U0010f8f2", "\U0010f8f3"  # around what `{% generation %}` holds
_WIDE = re.compile(r"%[-+ #0.]*(\d{6,}|\*)|\{[^{}]*\d{6,}")  # of %-formats and of str.format


class TooMuch(jinja2.TemplateError):
    """A rendering that takes more than WORK, or makes something larger than LARGEST."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}`: what the assistant says."""

    tags = {"generation"}  # noqa: RUF012  (as jinja2 has it)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


class _Bounded(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Counts what a template does, and stops it."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, day: datetime.date) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        self.left = WORK
        self.filters = {name: self._bounded(filter_) for name, filter_ in self.filters.items()} | {
            "tojson": self._bounded(_json), "_turns": self._turns, "_joined": self._joined
        }  # fmt: skip
        self.globals |= {"raise_exception": _refuse, "strftime_now": datetime.datetime.combine(day, datetime.time()).strftime}
        self.globals.pop("lipsum", None)

    def spend(self, work: int) -> None:
        self.left -= work
        if self.left < 0:
            raise TooMuch("it loops: it was stopped")

    def made(self, value: Any) -> Any:
        """A value that was computed, if it is not too large."""
        if isinstance(value, str | list | tuple):
            if len(value) > LARGEST:
                raise TooMuch(f"it makes a text of more than {LARGEST:,} characters: it was stopped")
            self.spend(len(value) >> 8)
        return value

    def concat(self, pieces: Iterable[str]) -> str:  # type: ignore[override]
        kept, length = [], 0
        for piece in pieces:
            kept.append(piece)
            length += len(piece)
            if length > LARGEST:
                raise TooMuch(f"it writes more than {LARGEST:,} characters: it was stopped")
        self.spend(length >> 8)
        return "".join(kept)

    def call(self, context: Any, called: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        self.spend(40)  # a macro's costs some microseconds
        _check_numbers(args, kwargs)
        return self.made(super().call(context, called, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            sizes = [len(side) if isinstance(side, str | list | tuple) else side for side in (left, right)]
            if any(isinstance(side, str | list | tuple) for side in (left, right)) and sizes[0] * sizes[1] > LARGEST:
                raise TooMuch(f"it makes a text of more than {LARGEST:,} characters: it was stopped")
        _check_numbers((left, right) if operator in ("*", "**") and not isinstance(left, str | list) else (), {})
        if operator == "%":
            _check_width(left)
        self.spend(1)
        return self.made(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Any:
        if getattr(value, "__name__", "") in ("format", "format_map"):  # it is asked for every method of a text
            _check_width(getattr(value, "__self__", None))
        return super().wrap_str_format(value)

    def _generate(self, source: nodes.Template, name: Any, filename: Any, defer_init: bool = False) -> Any:
        """Loops count their turns, and `~` what it makes."""
        for loop in source.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "_turns", [], [], None, None, lineno=loop.lineno)
        return super()._generate(_Joins().visit(source), name, filename, defer_init)

    def _turns(self, values: Any) -> Any:
        if isinstance(values, Sequence | dict):  # `loop.length` and the like need no copy
            self.spend(1 + len(values))
            return values
        return self._counted(values)

    def _counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.spend(1)
            yield value

    def _joined(self, values: Iterable[Any]) -> str:
        return self.concat(map(str, values))

    def _bounded(self, filter_: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(filter_)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.spend(1)
            _check_numbers(args, kwargs)
            if filter_.__name__ == "do_format":
                _check_width(args[0])
            return self.made(filter_(*args, **kwargs))

        return bounded


class _Joins(jinja2.visitor.NodeTransformer):
    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(nodes.List(node.nodes), "_joined", [], [], None, None, lineno=node.lineno)


def _check_numbers(args: Iterable[Any], kwargs: dict[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and abs(value) > 1_000_000:
            raise TooMuch(f"it computes with {value:,}: it was stopped")


def _check_width(pattern: Any) -> None:
    if isinstance(pattern, str) and _WIDE.search(pattern):
        raise TooMuch("it asks for a text of a great width: it was stopped")


def _refuse(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as it is, not as HTML would have it."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """One template. generation: whether it says itself, by `{% generation %}`, what the assistant's part is. dated: whether it asks for
    today's date. constants: the texts in its expressions. Raises jinja2's TemplateSyntaxError."""

    def __init__(self, source: str, day: datetime.date) -> None:
        self._environment = _Bounded(day)
        self.dated = "strftime_now" in source
        self._compiled = self._environment.from_string(source)
        parsed = self._environment.parse(source)
        consts = parsed.find_all(nodes.Const)
        self.generation = any(call.name == "_marked" for call in parsed.find_all(nodes.ExtensionAttribute))
        self.constants = frozenset(node.value for node in consts if isinstance(node.value, str))

    def render(self, messages: Sequence[Any], ask: bool, /, **variables: Any) -> str:
        """What it writes of messages; ask: with the beginning of an assistant's turn. Raises jinja2's errors, and whatever else a template
        may raise."""
        return self.marked(messages, ask, **variables)[0]

    def marked(self, messages: Sequence[Any], ask: bool, /, **variables: Any) -> tuple[str, list[tuple[int, int]]]:
        """The same, with where in it the assistant's parts are, if the template says so."""
        self._environment.left = WORK
        text = self._compiled.render(messages=list(messages), add_generation_prompt=ask, **({"tools": None, "documents": None} | variables))
        if not self.generation:
            return text, []
        bare, spans, begun = "", [], 0
        for part in re.split(f"([{_OPEN}{_CLOSE}])", text):
            if part == _OPEN:
                begun = len(bare)
            elif part == _CLOSE:
                spans.append((begun, len(bare)))
            else:
                bare += part
        return bare, spans


@functools.lru_cache(maxsize=64)
def compiled(source: str, day: datetime.date) -> ChatTemplate:
    return ChatTemplate(source, day)
