"""What lies next to the weights and belongs to the model: tokenizer, chat template, and where generation ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moejax.data.tokenizer import load_tokenizer, save_tokenizer
from moejax.hub.save import write_json
from moejax.hub.stored import read_json


def carry(folder: Path, base: Path | None, tokenizer: Any, ends: Sequence[int]) -> None:
    """Write the tokenizer's files and generation_config.json beside a model's weights in `folder` (`hub.save`, `hub.merge`).

    base: the folder that the model began with, where there is one: its chat template comes along where `tokenizer` knows its tokens and
    has none, and its generation_config.json. tokenizer: None writes no tokenizer. ends: ids that end an answer; those of config.json
    and generation_config.json are added. Raises OSError where a file cannot be written, UserError where one of base's holds no JSON.
    """
    if tokenizer is not None:
        if not tokenizer.chat_template and base is not None and (base / "tokenizer.json").is_file():
            theirs = load_tokenizer(str(base))
            if theirs.chat_template and theirs.get_vocab().items() <= tokenizer.get_vocab().items():
                tokenizer.chat_template = theirs.chat_template
        save_tokenizer(tokenizer, folder)
    path = folder / "generation_config.json"
    ours, config = read_json(path), read_json(folder / "config.json")
    carried = None if base is None else base / path.name
    theirs = read_json(carried) if carried is not None and carried.is_file() else {}
    ids = list(dict.fromkeys([*ends, *_named(config), *_named(theirs)])) or _named(ours)
    content = ours | theirs | {"eos_token_id": ids[0] if len(ids) == 1 else ids}
    if ids != _named(config):
        content.pop("_from_model_config", None)  # by that transformers would take config.json for the truth
    write_json(path, content)


def _named(config: dict[str, Any]) -> list[int]:
    """eos_token_id of a config: none, a number, or several."""
    found = config.get("eos_token_id")
    return [] if found is None else found if isinstance(found, list) else [found]
