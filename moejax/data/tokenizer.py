"""Tokenizers come from a `tokenizer.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moejax.errors import UserError, first_line


def load_tokenizer(source: str, added: Sequence[str] = ()) -> Any:
    """A fast tokenizer from a tokenizer.json, a folder that has one, or a Hub id.

    added: special tokens that get the next free ids, in order. It has an end-of-sequence token, and a padding token (the end of
    sequence where none is named). Raises UserError for a bare
    sentencepiece file: transformers 5 converts Mixtral's wrongly (it splits double spaces), so we do not guess.
    """
    # transformers advises on every import that PyTorch is missing; that is intended here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(source)
    tokenizer: Any
    if path.suffix == ".model":
        raise UserError(
            f"{path} is a sentencepiece file: its conversion differs between libraries. Give the tokenizer.json instead"
        )
    try:
        if path.is_file():
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
        elif path.is_dir() and not (path / "tokenizer_config.json").exists():
            if not (path / "tokenizer.json").exists():
                raise UserError(f"{path} holds no tokenizer.json (a tokenizer needs one; set tokenizer=PATH for another)")
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
        elif path.is_dir():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path))
        else:
            tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"tokenizer {source!r} could not be loaded ({type(error).__name__}: {first_line(error)}). "
            "Expected a tokenizer.json, a folder that has one, or a Hub id"
        ) from error
    tokenizer.add_tokens(list(added), special_tokens=True)
    if "</s>" in added:
        tokenizer.eos_token = "</s>"
    if "[PAD]" in added:
        tokenizer.pad_token = "[PAD]"
    vocabulary = tokenizer.get_vocab()
    if tokenizer.eos_token_id is None:
        for token in ("</s>", "<|endoftext|>"):
            if token in vocabulary:
                tokenizer.eos_token = token
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer {source!r} names no end-of-sequence token (looked for </s> and <|endoftext|>): name it as eos_token "
            "in tokenizer_config.json, or choose another (tokenizer=…)"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Raises UserError where the tokenizer knows ids that the model has no row for."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer's largest id is {largest}, the model's vocabulary has {vocab_size} rows: they do not belong together. "
            "Choose the model's own tokenizer (tokenizer=…), or a model with a larger vocabulary"
        )


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write tokenizer files that transformers 4 and 5 load: the class name that 5 writes is unknown to 4, and 5 reads 4's.

    Raises OSError where they cannot be written.
    """
    try:
        tokenizer.save_pretrained(str(folder))
    except OSError:
        raise
    except Exception as error:  # the library raises a bare Exception for a full disk
        raise OSError(f"{folder / 'tokenizer.json'}: {first_line(error)}") from error
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings = {k: v for k, v in settings.items() if k not in ("backend", "is_local", "local_files_only")}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
