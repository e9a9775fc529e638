"""An Ollama Modelfile: where the weights are, the run's template in Ollama's own language, and where an answer stops."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from moejax.data.conversation import Conversation
from moejax.data.ends import Ends
from moejax.data.supervision import prompt_of_talk
from moejax.errors import UserError

_PARAMETERS = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "repetition_penalty": "repeat_penalty"}
"""generation_config.json's name -> Ollama's."""
_TALKS = ("u", "su", "uau", "suau", "uauau")
"""Conversations in which a template must be told by its pieces: s, u, a of system, user, assistant."""


class _Pieces(NamedTuple):
    """What a template writes: before the first user's message, behind each, before an answer that was given and behind it; and before and
    behind what the system says at the beginning (None: it has no form for that)."""

    begin: str
    asks: str
    answers: str
    goes_on: str
    system: tuple[str, str] | None

    def prompt(self, said: Sequence[tuple[str, str]]) -> str:
        """As Ollama writes it."""
        text = ""
        for number, (role, content) in enumerate(said):
            match role:
                case "u":
                    text += (self.begin if number == 0 else "") + content + self.asks
                case "a":
                    text += self.answers + content + self.goes_on
                case _:
                    assert self.system is not None
                    text += self.system[0] + content + self.system[1]
        return text

    def template(self) -> str:
        user = f'{{{{ if eq $i 0 }}}}{self.begin}{{{{ end }}}}{{{{ $m.Content }}}}{self.asks}'
        assistant = f"{self.answers}{{{{ $m.Content }}}}{self.goes_on}"
        text = f'{{{{ if eq $m.Role "user" }}}}{user}{{{{ else if eq $m.Role "assistant" }}}}{assistant}'
        if self.system is not None:
            text += f'{{{{ else if and (eq $m.Role "system") (eq $i 0) }}}}{self.system[0]}{{{{ $m.Content }}}}{self.system[1]}'
        return f"{{{{ range $i, $m := .Messages }}}}{text}{{{{ end }}}}{{{{ end }}}}"


def modelfile(file: str, tokenizer: Any, template: str, ends: Ends, generation: Mapping[str, Any], adds_bos: bool) -> tuple[str, bool]:
    """The text of a Modelfile for the GGUF file `file` next to it; and whether it says how prompts are written.

    template: data.template. generation: the base's generation_config.json. adds_bos: llama.cpp puts the begin of a sequence before a
    prompt, so that the template must not.
    """
    lines = [f"FROM ./{file}"]
    pieces = _pieces(tokenizer, template, adds_bos)
    written = "" if pieces is None else pieces.template()
    fits = pieces is not None and not any(mark in piece for piece in _texts(pieces) for mark in ('"""', "{{", "}}"))
    if fits:
        lines.append(f'TEMPLATE """{written}"""')
    stops = dict.fromkeys([*tokenizer.convert_ids_to_tokens(list(ends.ids)), *filter(None, [ends.text])])
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    if generation.get("do_sample"):
        numbers = {name: generation.get(key) for key, name in _PARAMETERS.items()}
        lines += [f"PARAMETER {name} {value}" for name, value in numbers.items() if isinstance(value, int | float)]
    return "\n".join(lines) + "\n", fits


def _texts(pieces: _Pieces) -> tuple[str, ...]:
    return (pieces.begin, pieces.asks, pieces.answers, pieces.goes_on, *(pieces.system or ()))


def _pieces(tokenizer: Any, template: str, adds_bos: bool) -> _Pieces | None:
    """None where the template is not reported by such pieces."""

    def prompt(kinds: str) -> str | None:
        try:
            text = prompt_of_talk(_talk(kinds), tokenizer, template, "a conversation")[0]
        except UserError:
            return None
        return text.removeprefix(tokenizer.bos_token) if adds_bos and tokenizer.bos_token else text

    pieces = _told(prompt)
    if pieces is None:
        return None
    right = all(pieces.prompt(_said(kinds)) == prompt(kinds) for kinds in _TALKS if pieces.system or "s" not in kinds)
    return pieces if right else None


def _told(prompt: Callable[[str], str | None]) -> _Pieces | None:
    """The pieces between what is said in three conversations."""
    alone, on, system = prompt("u"), prompt("uau"), prompt("su")
    if alone is None or on is None:
        return None
    one, longer = _between(alone, _said("u")), _between(on, _said("uau"))
    if one is None or longer is None or not longer[1].startswith(one[1]):
        return None
    before = None if system is None else _between(system, _said("su"))
    return _Pieces(one[0], one[1], longer[1].removeprefix(one[1]), longer[2], None if before is None else (before[0], before[1]))


def _between(text: str, said: Sequence[tuple[str, str]]) -> list[str] | None:
    """What stands before, between and behind these contents; None where one is not there once."""
    pieces = [text]
    for _, content in said:
        if pieces[-1].count(content) != 1:
            return None
        pieces[-1:] = pieces[-1].split(content)
    return pieces


def _said(kinds: str) -> list[tuple[str, str]]:
    names = {"s": "Instructions", "u": "Question", "a": "Answer"}
    counts = accumulate(kinds, lambda seen, kind: {**seen, kind: seen.get(kind, 0) + 1}, initial=dict[str, int]())
    return [(kind, f"{names[kind]} {'ABC'[seen[kind] - 1]}") for kind, seen in zip(kinds, list(counts)[1:], strict=True)]


def _talk(kinds: str) -> Conversation:
    roles = {"s": "system", "u": "user", "a": "assistant"}
    messages = tuple({"role": roles[kind], "content": content} for kind, content in _said(kinds))
    return Conversation(messages, None, (True,) * len(messages))
