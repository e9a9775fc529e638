"""A tokenizer as the metadata of a GGUF file, by which llama.cpp makes the same ids: byte-level BPE, and sentencepiece's BPE.

llama.cpp has the pre-tokenizers of known tokenizers by name, each with its regular expressions and its use of merges (src/llama-vocab.cpp);
here a tokenizer.json's own are looked up among them. What it has no word for is refused: it would make other tokens without saying so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from moejax.errors import UserError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGITS = r"\p{N}"
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_SHOWN = 40  # characters of an expression in a message
_PRE: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGITS, _GPT2), False): "smollm",
    ((_QWEN2,), False): "qwen2",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_LLAMA3,), True): "llama-bpe",
}
"""What splits a text, one expression after the other, and whether words of the vocabulary need no merges -> llama.cpp's name."""

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # llama.cpp's types of tokens
_SPACE = "▁"


def metadata(tokenizer: Any, rows: int, ends: Sequence[int], prompt: str = "") -> dict[str, Any]:
    """key -> value of `tokenizer.ggml.*` and the chat template.

    rows: of the model's embedding; those that the tokenizer does not know are unused. ends: tokens that end an answer. prompt: as the
    run's template writes them (`spaces_first`). Raises UserError for a tokenizer that llama.cpp cannot hold, by what it lacks.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    if content["model"]["type"] != "BPE":
        raise _refused(f"its model is {content['model']['type']}, and only BPE is written")
    for entry in content["added_tokens"]:
        flags = [flag for flag in ("lstrip", "rstrip", "single_word") if entry[flag]]
        if flags:
            raise _refused(f"its added token {entry['content']!r} has {flags[0]}, which llama.cpp does not know")
    names = {id_: name for name, id_ in content["model"]["vocab"].items()} | {t["id"]: t["content"] for t in content["added_tokens"]}
    for id_ in range(rows):
        names.setdefault(id_, f"[PAD{id_}]")
    tokens = [names[id_] for id_ in range(rows)]
    if len(set(tokens)) < rows:
        twice = next(name for name in tokens if tokens.count(name) > 1)
        raise _refused(f"its token {twice!r} has two ids, which llama.cpp does not take")
    bytes_first = bool(content["model"].get("byte_fallback"))
    if bytes_first:
        found = _sentencepiece(content, tokens) | {"add_space_prefix": _prefixes(content, _begins_as_text(tokenizer, prompt))}
    else:
        found = _byte_level(content)
    types = _types(content, rows, bytes_first)
    found |= {"tokens": tokens, "token_type": types} | _special(tokenizer, ends)
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()} | _template(tokenizer)


def spaces_first(tokenizer: Any) -> bool:
    """Whether it puts a space before a text, and not before a piece of one behind a control token. llama.cpp does so before every piece or
    before none: what the run's prompts begin with decides, and their ids are the same."""
    pre = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]
    return any(part["type"] == "Metaspace" and part["prepend_scheme"] == "first" for part in _flat(pre, "pretokenizers"))


def _begins_as_text(tokenizer: Any, prompt: str) -> bool:
    """Rather than with a control token."""
    ids = tokenizer.backend_tokenizer.encode(prompt, add_special_tokens=False).ids
    return not ids or ids[0] not in tokenizer.backend_tokenizer.get_added_tokens_decoder()


def none() -> dict[str, Any]:
    """Of a file that answers ids only."""
    return {"tokenizer.ggml.model": "none"}


def _refused(why: str) -> UserError:
    return UserError(
        f"--format gguf: llama.cpp cannot hold this tokenizer: {why}. --without-tokenizer writes a file that takes and gives token ids; "
        "--format merged keeps the tokenizer as it is"
    )


def _types(content: dict[str, Any], rows: int, bytes_first: bool) -> list[int]:
    model, types = content["model"], [_UNUSED] * rows
    for name, id_ in model["vocab"].items():
        types[id_] = _BYTE if bytes_first and name in _BYTES else _NORMAL
    for entry in content["added_tokens"]:
        types[entry["id"]] = _CONTROL if entry["special"] else _USER_DEFINED
    unknown = model["vocab"].get(model.get("unk_token"))
    if unknown is not None and bytes_first:
        types[unknown] = _UNKNOWN
    return types


def _special(tokenizer: Any, ends: Sequence[int]) -> dict[str, Any]:
    """Ids of special tokens, and which of them a text gets."""
    found = {name: getattr(tokenizer, f"{key}_token_id") for name, key in _SPECIAL.items()}
    found |= dict(zip(("eot_token_id", "eom_token_id"), (id_ for id_ in ends if id_ != tokenizer.eos_token_id), strict=False))
    text = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).ids
    around = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids
    at = next((i for i in range(len(around)) if around[i : i + len(text)] == text), 0)
    before, behind = around[:at], around[at + len(text) :]
    if len(before) > 1 or behind not in ([], [tokenizer.eos_token_id]) or (before and found["bos_token_id"] not in (None, *before)):
        shown = tokenizer.convert_ids_to_tokens(before), tokenizer.convert_ids_to_tokens(behind)
        raise _refused(f"it puts {shown[0]} before a text and {shown[1]} behind it, and llama.cpp begin and end of sequence")
    if before:
        found["bos_token_id"] = before[0]
    known = {name: int(id_) for name, id_ in found.items() if id_ is not None}
    return known | {"add_bos_token": bool(before), "add_eos_token": bool(behind)}


_SPECIAL = {"bos_token_id": "bos", "eos_token_id": "eos", "unknown_token_id": "unk", "padding_token_id": "pad"}


def _template(tokenizer: Any) -> dict[str, Any]:
    return {"tokenizer.chat_template": tokenizer.chat_template} if isinstance(tokenizer.chat_template, str) else {}


def _byte_level(content: dict[str, Any]) -> dict[str, Any]:
    """GPT-2's kind: a letter for each byte."""
    model = content["model"]
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _refused(f"its BPE has {key} = {model[key]!r}")
    for part in _flat(content["normalizer"], "normalizers"):
        if part["type"] != "NFC":  # llama.cpp normalizes nothing: most texts are in that form
            raise _refused(f"its normalizer is {part['type']}")
    parts = [_split(part) for part in _flat(content["pre_tokenizer"], "pretokenizers")]
    splits, merges = tuple(expression for part in parts for expression in part), bool(model.get("ignore_merges"))
    if (splits, merges) not in _PRE or not any(p["type"] == "ByteLevel" for p in _flat(content["pre_tokenizer"], "pretokenizers")):
        raise _refused(f"it knows no such pre-tokenizer as {_named(content['pre_tokenizer'])}, but those of {', '.join(_PRE.values())}")
    return {"model": "gpt2", "pre": _PRE[splits, merges], "merges": [" ".join(pair) for pair in _pairs(model)]}


def _split(part: dict[str, Any]) -> list[str]:
    """The expressions by which a pre-tokenizer splits."""
    match part:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return [_GPT2] if part.get("use_regex", True) else []
        case {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}:
            return [expression]
        case {"type": "Digits", "individual_digits": True}:
            return [_DIGITS]
    return [part["type"]]


def _sentencepiece(content: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    """Llama's kind: letters with ▁ for a space, bytes where a letter is unknown. A token's score says when its merges come."""
    model, vocabulary = content["model"], content["model"]["vocab"]
    missing = next((name for name in sorted(_BYTES) if name not in vocabulary), None)
    if missing is not None:
        raise _refused(f"it falls back to bytes and lacks the token {missing}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(key):
            raise _refused(f"its BPE has {key} = {model[key]!r}")
    pairs = list(_pairs(model))
    _check_merges(pairs, vocabulary, {entry["content"] for entry in content["added_tokens"]})
    scores = _scores(pairs)
    return {"model": "llama", "pre": "default", "scores": [scores.get(name, -1e6) for name in tokens]}


def _scores(pairs: list[tuple[str, str]]) -> dict[str, float]:
    """Of every token that merges give: the earlier its merges, the higher. Runs of one letter whose merges lie among each other's (spaces)
    have one score, by which llama.cpp joins them from the left, as these merges do."""
    last = {left + right: number for number, (left, right) in enumerate(pairs)}
    scores: dict[str, float] = {}
    group, until = 0, -1
    for number, (left, right) in enumerate(pairs):
        token = left + right
        if number > until:
            group, until = number, last[token]
        elif token not in scores:
            until = max(until, last[token])
            if len(set(token)) > 1:
                raise _refused(f"the merges of its token {token!r} are among another's: sentencepiece's come one token after the other")
        scores.setdefault(token, -float(group))
    return scores


def _check_merges(pairs: list[tuple[str, str]], vocabulary: dict[str, int], added: set[str]) -> None:
    """llama.cpp merges whatever gives a token: the merges must be all of these."""
    known = set(pairs)
    for token in vocabulary.keys() - added:
        for at in range(1, len(token)):
            pair = token[:at], token[at:]
            if pair[0] in vocabulary and pair[1] in vocabulary and pair not in known:
                raise _refused(f"{pair[0]!r} and {pair[1]!r} are {token!r} by its vocabulary and not by its merges")


def _prefixes(content: dict[str, Any], as_text: bool) -> bool:
    """Whether every piece of text gets a space before it; as_text: prompts begin with one."""
    normalizers, pre = _flat(content["normalizer"], "normalizers"), _flat(content["pre_tokenizer"], "pretokenizers")
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    match normalizers, pre:
        case [{"type": "Prepend", "prepend": "▁"}, last], [] if last == replaces:
            return True
        case [only], [] if only == replaces:
            return False
        case [], [{"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}]:
            return bool(scheme == "always" or (scheme == "first" and as_text))
    raise _refused(
        f"its normalizer is {_named(content['normalizer'])}, its pre-tokenizer {_named(content['pre_tokenizer'])}, and llama.cpp writes ▁ "
        "for spaces and before every piece of text"
    )


_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


def _flat(part: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return [leaf for each in part[inside] for leaf in _flat(each, inside)] if part["type"] == "Sequence" else [part]


def _named(part: dict[str, Any] | None) -> str:
    """For people: the kinds of a normalizer or pre-tokenizer, an expression or text by its beginning."""
    leaves = [] if part is None else _flat(part, "normalizers" if "normalizers" in part else "pretokenizers")
    names = []
    for leaf in leaves:
        by = next(iter(leaf.get("pattern", {}).values()), "")
        shown = by if len(by) <= _SHOWN else f"{by[:_SHOWN]}…"
        names.append(f"{leaf['type']} by {shown}" if by else leaf["type"])
    return " and ".join(names) or "none"


def _pairs(model: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Merges, in either spelling of tokenizer.json."""
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right
