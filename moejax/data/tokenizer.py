"""Tokenizers come from a `tokenizer.json`."""

from __future__ import annotations

import codecs
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from moejax.config import AUTO_TOKENS
from moejax.documents import read_json
from moejax.errors import UserError, first_line
from moejax.files import settle

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


def load_tokenizer(source: str, added: Sequence[str] = ()) -> Any:
    """A fast tokenizer from a tokenizer.json, a folder that has one, or a Hub id.

    added: special tokens that get the next free ids, in order; `auto`: ChatML's, where it lacks them. It has an end-of-sequence token, and
    a padding token (the end of sequence where none is named). Raises UserError for a bare sentencepiece file: transformers 5 converts
    Mixtral's wrongly (it splits double spaces), so we do not guess.
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
        elif path.is_dir() and not (path / "tokenizer.json").exists():
            raise UserError(
                f"{path} holds no tokenizer.json{_named(path)}: set tokenizer=PATH to one of the same vocabulary, or to a folder that has "
                "one. Other files (tiktoken, sentencepiece) are not converted here, and no model's own code is run"
            )
        elif path.is_dir() and not (path / "tokenizer_config.json").exists():
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
        elif path.is_dir():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path))
        else:  # code of a repository's own is never run: without False transformers would ask, in the terminal
            tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:
        _check_files(path)
        raise UserError(
            f"tokenizer {source!r} could not be loaded ({type(error).__name__}: {first_line(error)}). "
            "Expected a tokenizer.json, a folder that has one, or a Hub id"
        ) from error
    _beside(tokenizer, path)
    tokenizer.backend_tokenizer.no_truncation()  # some tokenizer.json cut without a word; what is cut here is counted
    tokenizer.backend_tokenizer.no_padding()
    if tuple(added) == AUTO_TOKENS:
        added = lacking(tokenizer)
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


def byte_tokenizer() -> Any:
    """A `tokenizers.Tokenizer` in which each byte of UTF-8 is a token, with <unk>, <s> and </s> as 0, 1 and 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.add_special_tokens(names[:3])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _named(folder: Path) -> str:
    """What a folder without a tokenizer.json says that its tokenizer is."""
    path = folder / "tokenizer_config.json"
    name = read_json(path).get("tokenizer_class") if path.is_file() else None
    return f" (its tokenizer is a {name})" if name else ""


def _check_files(path: Path) -> None:
    """Raises UserError that names the one of a tokenizer's files which is no JSON object, where a library only said that it is none."""
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    for file in [path] if path.is_file() else [path / name for name in names if (path / name).is_file()]:
        read_json(file)
        if file.read_bytes().startswith(codecs.BOM_UTF8):
            raise UserError(f"{file} begins with a byte-order mark, which `transformers` does not take: save it as UTF-8 without one")


def _beside(tokenizer: Any, path: Path) -> None:
    """The chat template in a file next to tokenizer.json, where the tokenizer was loaded without its folder's other files."""
    file = (path.parent if path.is_file() else path) / "chat_template.jinja"
    if not tokenizer.chat_template and file.is_file():
        try:
            tokenizer.chat_template = file.read_text(encoding="utf-8-sig")
        except ValueError:
            raise UserError(f"{file}: not UTF-8 text: save it as UTF-8") from None


def lacking(tokenizer: Any) -> list[str]:
    """ChatML's tokens that the tokenizer does not have as tokens of their own."""
    added = {token.content for token in tokenizer.backend_tokenizer.get_added_tokens_decoder().values()}
    return [token for token in CHATML_TOKENS if token not in added]


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Raises UserError where the tokenizer knows ids that the model has no row for."""
    check_ids(tokenizer.get_vocab().values(), vocab_size)


def check_ids(ids: Iterable[int], vocab_size: int) -> None:
    """Raises UserError where the model has no row for one of a tokenizer's ids."""
    largest = max(ids)
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer's largest id is {largest}, the model's vocabulary has {vocab_size} rows: they do not belong together. "
            "Choose the model's own tokenizer (tokenizer=…), or a model with a larger vocabulary; added_tokens get rows of their own"
        )


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write tokenizer files that transformers 4 and 5 load, with the chat template and the special tokens where each looks for them.

    The class name that 5 writes is unknown to 4, and 5 reads 4's. `model_input_names`: no model here has token types, and `generate`
    refuses what it does not know. Each file is there whole or not at all. Raises OSError where they cannot be written.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tokenizer-") as aside:
        try:
            tokenizer.save_pretrained(aside)
        except OSError:
            raise
        except Exception as error:  # the library raises a bare Exception for a full disk
            raise OSError(f"{folder / 'tokenizer.json'}: {first_line(error)}") from error
        path = Path(aside, "tokenizer_config.json")
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings = {k: v for k, v in settings.items() if k not in ("backend", "is_local", "local_files_only")}
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
        if isinstance(tokenizer.chat_template, str):
            settings["chat_template"] = tokenizer.chat_template
        for name, content in (("tokenizer_config.json", settings), ("special_tokens_map.json", tokenizer.special_tokens_map)):
            Path(aside, name).write_text(json.dumps(dict(content), indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
        for new in (file for file in Path(aside).rglob("*") if file.is_file()):
            place = folder / new.relative_to(aside)
            place.parent.mkdir(exist_ok=True)
            settle(new, place)
