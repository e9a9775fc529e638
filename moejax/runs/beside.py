"""What lies next to the weights and belongs to the model: tokenizer, chat template, and where generation ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moejax.config import Experiment
from moejax.data.ends import ends_of, named
from moejax.data.tokenizer import load_tokenizer, save_tokenizer
from moejax.documents import read_json
from moejax.hub.save import write_json
from moejax.hub.stored import AGAIN


def carry(folder: Path, base: Path | None, tokenizer: Any, template: str) -> None:
    """Write the tokenizer's files and generation_config.json next to a model's weights in `folder` (`hub.save`, `hub.merge`).

    base: the folder that the model began with, where there is one: its generation_config.json comes along, and its chat template where
    `tokenizer` knows its tokens and has none. tokenizer: None writes no tokenizer. template: the run's data.template. What ends an answer
    (`data.ends`) is in generation_config.json. Raises OSError where a file cannot be written, UserError where one of base's is damaged.
    """
    path = folder / "generation_config.json"
    ours, config = read_json(path, remedy=AGAIN), read_json(folder / "config.json", remedy=AGAIN)
    carried = None if base is None else base / path.name
    theirs = read_json(carried, remedy=AGAIN) if carried is not None and carried.is_file() else {}
    ids = dict.fromkeys([*named(config), *named(theirs)])
    if tokenizer is not None:
        tokenizer.chat_template = template_of(tokenizer, base)
        save_tokenizer(tokenizer, folder)
        ids = dict.fromkeys([*ends_of(tokenizer, template).ids, *ids])
    ends = list(ids) or named(ours)
    content = ours | theirs | {"eos_token_id": ends[0] if len(ends) == 1 else ends}
    if ends != named(config):
        content.pop("_from_model_config", None)  # by that transformers would take config.json for the truth
    write_json(path, content)


def template_of(tokenizer: Any, base: Path | None) -> Any:
    """The tokenizer's chat template; where it has none, that of the model in `base` whose tokens it knows."""
    if not tokenizer.chat_template and base is not None and (base / "tokenizer.json").is_file():
        other = load_tokenizer(str(base))
        if other.chat_template and other.get_vocab().items() <= tokenizer.get_vocab().items():
            return other.chat_template
    return tokenizer.chat_template


def carry_added_tokens(folder: Path, experiment: Experiment, tokenizer: Any) -> None:
    """Write the tokenizer next to an adapter in `folder`, where the run added tokens to it. Raises OSError where it cannot be written."""
    if experiment.added_tokens and tokenizer is not None:
        save_tokenizer(tokenizer, folder)
