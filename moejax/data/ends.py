"""Where an answer ends: the end of a turn by the template, generation_config.json and config.json together."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from moejax.data import chat
from moejax.data.text_tokens import text_tokens
from moejax.documents import read_json
from moejax.errors import UserError


class Ends(NamedTuple):
    """ids: tokens, each of which ends an answer; the first is that of training. text: what ends one though it is no token, or ""."""

    ids: tuple[int, ...]
    text: str = ""


def ends_of(tokenizer: Any, template: str, folder: Path | None = None) -> Ends:
    """How answers end in this template (data.template), with this tokenizer and, where there is one, the model's folder.

    Raises UserError for a chat template that is asked for and cannot be rendered, and for a file that holds no JSON.
    """
    ids, text = [tokenizer.eos_token_id], ""
    if getattr(tokenizer, "chat_template", None):
        try:
            end = chat.end_of_turn(tokenizer)
        except UserError:
            if template in ("chat", "chatml"):
                raise
            end = ""
        token = text_tokens(tokenizer).control_at(end) if end else None
        if token is not None:
            ids.insert(0 if template in ("chat", "chatml") else 1, tokenizer.convert_tokens_to_ids(token))
        elif template in ("chat", "chatml"):
            text = end
    for name in ("generation_config.json", "config.json"):
        if folder is not None and (folder / name).is_file():
            ids += named(read_json(folder / name))
    return Ends(tuple(dict.fromkeys(id_ for id_ in ids if id_ is not None)), text)


def named(config: dict[str, Any]) -> list[int]:
    """eos_token_id of a config: none, a number, or several."""
    found = config.get("eos_token_id")
    several = found if isinstance(found, list) else [found]
    return [id_ for id_ in several if isinstance(id_, int) and not isinstance(id_, bool) and id_ >= 0]
