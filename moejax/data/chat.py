"""A tokenizer's own chat template: prompt and answer as it writes them, and how it ends a turn."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from moejax import installation
from moejax.errors import UserError, first_line

_QUESTION, _ANSWER = "a question", "an answer"  # texts to see what a template writes around them


class Turn(NamedTuple):
    """prompt: all before the answer; answer: the answer with what the template writes before it and behind it."""

    prompt: str
    answer: str


def rendered(tokenizer: Any, question: str, answer: str | None = None, where: str = "") -> Turn:
    """What the template makes of a question, and of its answer ("" where none is given). where: the record, for messages.

    Raises UserError for a template that is missing, broken, or refuses; for one whose prompt is no beginning of the whole; and where it
    leaves out of the answer more than white space.
    """
    asked = [{"role": "user", "content": question}]
    prompt = applied(tokenizer, asked, True, where)
    if answer is None:
        return Turn(prompt, "")
    whole = applied(tokenizer, [*asked, {"role": "assistant", "content": answer}], False, where)
    if not whole.startswith(prompt):
        raise UserError(
            f"{_named(tokenizer, where)}: what it writes to ask for an answer ({prompt[-60:]!r} at its end) is not how it begins the same "
            "turn with an answer: where the answer begins is not known. Use data.template = mistral or alpaca, or another chat template"
        )
    turn = Turn(prompt, whole[len(prompt) :])
    if _bare(answer) not in _bare(turn.answer):
        raise UserError(
            f"{_named(tokenizer, where)} does not write this answer as it stands: a part of it would not be learned. "
            "Use data.template = mistral or alpaca, or another chat template"
        )
    return turn


def _bare(text: str) -> str:
    """Without white space, which many templates trim."""
    return "".join(text.split())


def _named(tokenizer: Any, where: str) -> str:
    name = getattr(tokenizer, "name_or_path", "") or "this tokenizer"
    return f"data.template = chat: the chat template of {name}{f', {where}' if where else ''}"


def applied(tokenizer: Any, messages: list[dict[str, str]], ask: bool, where: str = "") -> str:
    """What the template writes of messages; ask: with the beginning of an assistant's turn. Raises UserError as `rendered` does."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("data.template = chat: this tokenizer has no chat template; use mistral or alpaca, or another tokenizer")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))
    except ImportError as error:
        raise UserError(f"data.template = chat needs jinja2 ({first_line(error)}): {installation.for_packages(['jinja2'])}") from None
    except Exception as error:
        line = f", its line {error.lineno}" if getattr(error, "lineno", None) else ""  # type: ignore[attr-defined]
        raise UserError(
            f"{_named(tokenizer, where)} could not be rendered{line} ({type(error).__name__}: {first_line(error)}). It must take "
            "a user's message, and an assistant's after it; use data.template = mistral or alpaca, or another chat template"
        ) from error


def literals(tokenizer: Any) -> str:
    """What the template writes around a question and behind an answer; "" without one, or where it cannot be rendered."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    try:
        return rendered(tokenizer, _QUESTION).prompt + end_of_turn(tokenizer)
    except UserError:
        return ""


def end_of_turn(tokenizer: Any) -> str:
    """What the template writes behind an answer, without the white space around it. Raises UserError as `rendered` does."""
    prompt, answer = rendered(tokenizer, _QUESTION, _ANSWER)
    if _bare(_QUESTION) not in _bare(prompt):
        raise UserError(
            f"{_named(tokenizer, '')} does not write a user's message (it asks for an answer with {prompt[-60:]!r}). "
            "Use data.template = mistral or alpaca, or another chat template"
        )
    return answer.rpartition(_ANSWER)[2].strip() if _ANSWER in answer else ""


# What looks like a mark of a template, be it a token or not: <|im_end|>, </s>, [/INST], ### Response:
MARK = re.compile(r"<[^<>\s]{1,60}>|\[/?[A-Z_]{2,40}\]|#{2,} ?[A-Z][A-Za-z]+:")
