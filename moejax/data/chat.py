"""A tokenizer's own chat template: prompt and answer as it writes them, and how it ends a turn."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from moejax import installation
from moejax.data.tokenizer import lacking
from moejax.errors import UserError, first_line

if TYPE_CHECKING:
    from moejax.data.chat_template import ChatTemplate

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_QUESTION, _ANSWER = "a question", "an answer"  # texts to see what a template writes around them


_OPENS = re.compile(r"(?:<(?P<tag>[\w:]*think\w*)>|\[(?P<mark>THINK)\])(?P<space>\s*)\Z")


class Opened(NamedTuple):
    """The thinking that a prompt opens at its end, from `begin` on: `<think>` with white space, as DeepSeek-R1 and QwQ have it."""

    begin: int
    opener: str
    closer: str  # with the white space around it that the opener's asks for


def opened(text: str, end: int | None = None) -> Opened | None:
    """What a prompt opens: a text, or one up to `end`."""
    end = len(text) if end is None else end
    found = _OPENS.search(text, max(0, end - 60), end)
    if found is None:
        return None
    closer = f"</{found['tag']}>" if found["tag"] else f"[/{found['mark']}]"
    return Opened(found.start(), found[0].rstrip(), f"\n{closer}\n\n" if found["space"] else closer)


def thoughtless(text: str, begin: int) -> bool:
    """Whether the answer that begins there has no thinking, though its prompt opens one."""
    opens = opened(text, begin)
    return opens is not None and text[begin:].lstrip().startswith(opens.closer.strip())


def at_use(prompt: str, write: Callable[[str | None], str], said: str, thought: str = "") -> str | None:
    """A turn as it is at use: its prompt, and what the template writes behind it; None where the prompt is no beginning of that.

    Where the prompt opens a thinking that the template does not close (it strips it, or has no word for it), the answer's thinking stands
    there, and an empty one (as Qwen3 writes it) where it has none. write: what the template makes of the turn, and with another answer
    and no thinking. said: the answer, which may begin with its thinking; thought: its thinking, if it lies elsewhere.
    """
    whole, opens = write(None), opened(prompt)
    if opens is None:
        return whole if whole.startswith(prompt) else None
    mark, rest = opens.closer.strip(), whole[len(prompt) :]
    if whole.startswith(prompt) and mark in rest and not rest.lstrip().startswith(opens.opener):
        return whole
    before, closed, after = said.partition(mark)
    if closed:
        thought, said = before.lstrip().removeprefix(opens.opener), after
    head, whole = prompt[: opens.begin], write(said.lstrip("\n"))
    if not whole.startswith(head):
        return None
    rest = whole[len(head) :].removeprefix(prompt[opens.begin :])
    return prompt + thought.strip("\n") + ("" if rest.startswith(mark) else opens.closer) + rest


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

    def write(other: str | None) -> str:
        return applied(tokenizer, [*asked, {"role": "assistant", "content": answer if other is None else other}], False, where)

    whole = at_use(prompt, write, answer)
    if whole is None:
        raise UserError(
            f"{_named(tokenizer, where)}: what it writes to ask for an answer ({prompt[-60:]!r} at its end) is not how it begins the same "
            "turn with an answer: where the answer begins is not known. Use data.template = mistral or alpaca, or another chat template"
        )
    turn, opens = Turn(prompt, whole[len(prompt) :]), opened(prompt)
    if bare(answer).removeprefix(opens.opener if opens else "") not in bare(turn.answer):
        raise UserError(
            f"{_named(tokenizer, where)} does not write this answer as it stands: a part of it would not be learned. "
            "Use data.template = mistral or alpaca, or another chat template"
        )
    return turn


def bare(text: str) -> str:
    """Without white space, which many templates trim."""
    return "".join(text.split())


def _named(tokenizer: Any, where: str) -> str:
    name = getattr(tokenizer, "name_or_path", "") or "this tokenizer"
    return f"data.template = chat: the chat template of {name}{f', {where}' if where else ''}"


_NONE = (
    "data.template = chat (what conversations are rendered by where nothing is set): this tokenizer has no chat template: use "
    "data.template = mistral, alpaca or chatml (with added_tokens=auto where the tokenizer has not its tokens), or another tokenizer"
)
_ONE = (
    "It must take a user's message, and an assistant's after it; use data.template = mistral or alpaca, or another chat template"
)


class _Settled(NamedTuple):
    """What else a tokenizer's template is rendered with: data.template_args, data.template_date."""

    variables: dict[str, Any]
    day: datetime.date | None


_SETTLED: WeakKeyDictionary[Any, _Settled] = WeakKeyDictionary()


def settle(tokenizer: Any, template: str, variables: dict[str, Any], date: str | None) -> None:
    """From now on this tokenizer's template is rendered with these variables and this day as today (None: today), for training and for
    use alike. template: `chatml` gives the tokenizer that one. Raises UserError where it lacks ChatML's tokens, and for a variable that is
    the conversation's own or stands nowhere in the template."""
    own = sorted({"messages", "add_generation_prompt", "tools"} & variables.keys())
    if own:
        raise UserError(f"data.template_args: {own[0]} is given by each conversation: remove it")
    unread = [name for name in variables if template == "chat" and not re.search(rf"\b{re.escape(name)}\b", sources(tokenizer))]
    if unread:
        raise UserError(f"data.template_args: {unread[0]} does not stand in the tokenizer's chat template, and changes nothing: remove")
    if template == "chatml":
        absent = lacking(tokenizer)
        if absent:
            raise UserError(
                f"data.template = chatml: this tokenizer has no token {' and no '.join(absent)}, and spelt out as text they would be no "
                "marks: added_tokens=auto adds them, with rows of the embedding that are trained; or use data.template = mistral, or the "
                "model's chat variant, whose tokenizer has a template of its own"
            )
        tokenizer.chat_template = CHATML
    _SETTLED[tokenizer] = _Settled(variables, datetime.date.fromisoformat(date) if date else None)


def template_of(tokenizer: Any, tools: Sequence[Any] | None = None) -> ChatTemplate:
    """The tokenizer's chat template, compiled. Raises UserError where there is none, jinja2's errors, and ValueError for several of which
    none is the default."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(_NONE)
    from moejax.data.chat_template import compiled

    settled = _SETTLED.get(tokenizer)
    day = None if settled is None else settled.day
    return compiled(tokenizer.get_chat_template(None, tools), day or datetime.date.today())


def applied(tokenizer: Any, messages: Sequence[Any], ask: bool, where: str = "", advice: str = _ONE) -> str:
    """What the template writes of messages; ask: with the beginning of an assistant's turn. Raises UserError as `rendered` does."""
    return marked(tokenizer, messages, ask, None, where, advice)[0]


def marked(
    tokenizer: Any, messages: Sequence[Any], ask: bool, tools: Sequence[Any] | None, where: str = "", advice: str = _ONE
) -> tuple[str, list[tuple[int, int]]]:
    """The same with tools, and where in the text the assistant's parts are, if the template says so by `{% generation %}`."""
    settled = _SETTLED.get(tokenizer)
    try:
        template = template_of(tokenizer, tools)
        variables = {**tokenizer.special_tokens_map, **({} if settled is None else settled.variables), "tools": tools}
        return template.marked(messages, ask, **variables)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"data.template = chat needs jinja2 ({first_line(error)}): {installation.for_packages(['jinja2'])}") from None
    except Exception as error:
        line = f", its line {error.lineno}" if getattr(error, "lineno", None) else ""  # type: ignore[attr-defined]
        raise UserError(
            f"{_named(tokenizer, where)} could not be rendered{line} ({type(error).__name__}: {first_line(error)}). {advice}"
        ) from error


def gives_spans(tokenizer: Any, tools: Sequence[Any] | None = None) -> bool:
    """Whether the template says by `{% generation %}` what the assistant's part is."""
    return template_of(tokenizer, tools).generation


def asks_date(tokenizer: Any) -> bool:
    """Whether the template writes today's date."""
    try:
        return bool(getattr(tokenizer, "chat_template", None)) and template_of(tokenizer).dated
    except Exception:  # noqa: BLE001  (a broken template is reported with the record that it is rendered for)
        return False


def sources(tokenizer: Any) -> str:
    """The text of the tokenizer's templates."""
    return str(tokenizer.chat_template)


def spelled(tokenizer: Any) -> re.Pattern[str]:
    """What the template may look for in a message: its own constants, but for words."""
    found = template_of(tokenizer).constants
    marks = sorted(text for text in found if len(text) > 2 and re.search(r"[^\w\s]", text))
    return re.compile("|".join(map(re.escape, marks)) or "(?!)")


def literals(tokenizer: Any) -> str:
    """What the template writes around a question and behind an answer; "" without one, or where it cannot be rendered."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    try:
        return rendered(tokenizer, _QUESTION).prompt + end_of_turn(tokenizer)
    except UserError:
        return ""


def end_of_turn(tokenizer: Any) -> str:
    """What the template writes behind an answer, without the white space around it, nor the end of sequence behind something else. Raises
    UserError as `rendered` does."""
    prompt, answer = rendered(tokenizer, _QUESTION, _ANSWER)
    if bare(_QUESTION) not in bare(prompt):
        raise UserError(
            f"{_named(tokenizer, '')} does not write a user's message (it asks for an answer with {prompt[-60:]!r}). "
            "Use data.template = mistral or alpaca, or another chat template"
        )
    end = answer.rpartition(_ANSWER)[2].strip() if _ANSWER in answer else ""
    return end.removesuffix(tokenizer.eos_token).strip() or end


# What looks like a mark of a template, be it a token or not: <|im_end|>, </s>, [/INST], ### Response:
MARK = re.compile(r"<[^<>\s]{1,60}>|\[/?[A-Z_]{2,40}\]|#{2,} ?[A-Z][A-Za-z]+:")
