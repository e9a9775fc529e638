"""Text to tokens: what a user wrote stays text, what a template wrote is its tokens.

A tokenizer takes `</s>` in a text for its token of that name, wherever it comes from. Here the control tokens in users' texts are
replaced by names of our own before a template is rendered (`guard`). A rendered text without such names goes through the tokenizer itself.
One with them goes through a second tokenizer, in which control tokens are text, and the template's have names of their own.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from tokenizers import AddedToken, Tokenizer

from moejax.data import chat

_NONCE = secrets.token_hex(8)  # nobody's text can hold it
_GUARDED, _TEMPLATES = "\U0010f8f0", "\U0010f8f1"
_TAG = re.compile(r"</?[a-z_]+>")
_OURS = "[\U0010f8f0-\U0010f8f4]"  # all letters that stand for something in this room: chat_template's and turns' too
_GUARD = re.compile(rf"{_GUARDED}{_NONCE}-(\d+){_GUARDED}")


class TextTokens:
    """One tokenizer's. controls: its special tokens, and those of its other added tokens that `template_writes`; tags: of the latter those
    in which an assistant thinks and calls tools."""

    def __init__(self, tokenizer: Any, template_writes: str = "") -> None:
        backend = tokenizer.backend_tokenizer
        added = backend.get_added_tokens_decoder()
        written = set(chat.MARK.findall(template_writes))
        found = {token.content: (id_, token) for id_, token in added.items() if token.special or token.content in written}
        self.controls = tuple(sorted(found, key=len, reverse=True))
        small = backend.normalizer is not None and backend.normalizer.normalize_str("A") == "a"  # it takes </S> for </s>
        spelled, flags = "|".join(map(re.escape, self.controls)), re.IGNORECASE if small else re.NOFLAG
        self._pattern = re.compile(spelled, flags) if self.controls else None
        self._hidden = re.compile(f"{spelled}|{_OURS}" if self.controls else _OURS, flags)
        self.tags = frozenset(text for text in self.controls if _TAG.fullmatch(text) and not found[text][1].special)
        self._hidden_own = re.compile("|".join([*(re.escape(text) for text in self.controls if text not in self.tags), _OURS]), flags)
        self._spellings = list(self.controls)
        self._number = {content: number for number, content in enumerate(self.controls)}
        content = json.loads(backend.to_str())
        for entry in content["added_tokens"]:
            entry["special"] = entry["special"] or entry["content"] in found
        _forget(content, self.controls)
        self._encoder = Tokenizer.from_str(json.dumps(content))
        self._encoder.encode_special_tokens = True  # as text
        self._backend, self._controls = backend, {id_: text for text, (id_, _) in found.items()}
        self._unknown_text = _unknown(content["model"])
        self._unknown = None if self._unknown_text is None else backend.token_to_id(self._unknown_text)
        self._counted = frozenset(self._controls) - {self._unknown}
        self._encoder.add_tokens(
            [
                AddedToken(self._name(text), special=False, lstrip=found[text][1].lstrip, rstrip=found[text][1].rstrip, normalized=False)
                for text in self.controls
            ]
        )
        self._ids = {self._encoder.token_to_id(self._name(text)): found[text][0] for text in self.controls}

    def _name(self, control: str) -> str:
        return f"{_TEMPLATES}{_NONCE}-{self._number[control]}{_TEMPLATES}"

    def guard(self, text: str, *, own: bool = False) -> str:
        """A user's text, its control tokens under names of ours. own: the assistant's, which may think and call tools in tags that are
        added tokens and not special ones (<think>, <tool_call>): they stay what they are."""
        hidden = self._hidden_own if own else self._hidden
        return hidden.sub(lambda found: f"{_GUARDED}{_NONCE}-{self._numbered(found[0])}{_GUARDED}", text)

    def _numbered(self, spelling: str) -> int:
        if spelling not in self._number:
            self._number[spelling] = len(self._spellings)
            self._spellings.append(spelling)
        return self._number[spelling]

    def shown(self, rendered: str) -> str:
        """A rendered text as it is read, with what was guarded in it."""
        return _GUARD.sub(lambda found: self._spellings[int(found[1])], rendered)

    def control_in(self, text: str, *, own: bool = False) -> str | None:
        """The first control token that stands in a text as if it were one; own: as in `guard`."""
        there = () if self._pattern is None else self._pattern.finditer(text)
        return next((found[0] for found in there if not own or found[0] not in self.tags), None)

    def control_at(self, text: str) -> str | None:
        """The control token with which a text begins."""
        found = None if self._pattern is None else self._pattern.match(text)
        return None if found is None else found[0]

    def controls_in(self, rendered: str) -> list[tuple[int, int]]:
        """(end, begin) of the control tokens of a rendered text, which are the template's own."""
        if self._pattern is None:
            return []
        return [(found.end(), found.start()) for found in self._pattern.finditer(rendered) if found[0] != self._unknown_text]

    def controls_of(self, ids: Sequence[int]) -> list[int]:
        """Which of these tokens are control tokens (<unk> is none: any text may be it)."""
        controls = self._counted
        return [number for number, id_ in enumerate(ids) if id_ in controls]

    def unknown_in(self, ids: np.ndarray) -> int:
        """How many of these tokens stand for letters that the tokenizer lacks."""
        return 0 if self._unknown is None else int(np.count_nonzero(ids == self._unknown))

    def unknown_letter(self, texts: Iterable[str]) -> str:
        """The first letter of users' texts that the tokenizer lacks; "" where there is none."""
        letters = list(dict.fromkeys(chain.from_iterable(texts)))
        return next((x for x, ids in zip(letters, self.as_text(letters), strict=True) if self._unknown in ids), "")

    def encode(self, rendered: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered texts: what `guard` did not change of control tokens is those tokens, all else is text."""
        encodings = self._backend.encode_batch_fast([text for text in rendered if not _GUARD.search(text)], add_special_tokens=False)
        plain = iter(encodings)
        return [self._guarded_ids(text) if _GUARD.search(text) else self._plain_ids(text, next(plain).ids) for text in rendered]

    def _plain_ids(self, rendered: str, ids: list[int]) -> list[int]:
        """`ids` of a text, but where the tokenizer made control tokens of what is none as it stands (NFKC: fullwidth letters)."""
        seen = sum(id_ in self._controls and id_ != self._unknown for id_ in ids)
        written = len(self._pattern.findall(rendered)) if seen and self._pattern is not None else seen
        return self._guarded_ids(rendered) if seen > written else ids

    def _guarded_ids(self, rendered: str) -> list[int]:
        """The template's control tokens are found by the tokenizer itself, with a letter in place of what is guarded."""
        guarded = iter([self._spellings[int(number)] for number in _GUARD.findall(rendered)])
        bare = _GUARD.sub(_GUARDED, rendered)
        seen = self._backend.encode(bare, add_special_tokens=False)
        text, done = "", 0
        for id_, (start, end) in zip(seen.ids, seen.offsets, strict=True):
            control = self._controls.get(id_)
            # White space next to it may belong to the match, and the tokenizer may look at small letters; what is <unk> is not written so.
            place = -1 if control is None else bare[start:end].lower().find(control.lower())
            if control is not None and place >= 0 and start >= done:
                text += bare[done : start + place] + self._name(control)
                done = start + place + len(control)
        text = "".join(next(guarded) if letter == _GUARDED else letter for letter in text + bare[done:])
        return [self._ids.get(id_, id_) for id_ in self._encoder.encode(text, add_special_tokens=False).ids]

    def as_text(self, texts: Iterable[str]) -> list[list[int]]:
        """Token ids of users' texts, no control token among them."""
        return self.encode([self.guard(text) for text in texts])


def _unknown(model: dict[str, Any]) -> str | None:
    """The token for what a tokenizer.json's model lacks."""
    number = model.get("unk_id")
    return model.get("unk_token") if number is None else model["vocab"][number][0]  # Unigram: [piece, score]


def _forget(tokenizer: dict[str, Any], controls: Iterable[str]) -> None:
    """Take the control tokens out of the model of a tokenizer.json: some build them of the letters of a text (the bundled `[INST]`)."""
    model, gone = tokenizer["model"], set(controls)
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: [piece, score]
        unknown = model.get("unk_id")
        gone &= {piece for index, (piece, _) in enumerate(vocabulary) if index != unknown}
        model["vocab"] = [[_gone(piece) if piece in gone else piece, score] for piece, score in vocabulary]
    else:
        gone = (gone & vocabulary.keys()) - {model.get("unk_token")}
        model["vocab"] = {_gone(piece) if piece in gone else piece: id_ for piece, id_ in vocabulary.items()}
        merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model.get("merges") or ()]
        if merges:
            model["merges"] = [merge for merge in merges if not gone & {*merge, "".join(merge)}]
    tokenizer["added_tokens"] = [entry for entry in tokenizer["added_tokens"] if entry["content"] not in gone]


def _gone(piece: str) -> str:
    return f"{_TEMPLATES}{_NONCE}{piece}"


_KNOWN: WeakKeyDictionary[Any, tuple[Any, TextTokens]] = WeakKeyDictionary()


def text_tokens(tokenizer: Any) -> TextTokens:
    """The tokenizer's, made once. Its chat template, where it has one that can be rendered, says which added tokens are control tokens."""
    state = (len(tokenizer), str(getattr(tokenizer, "chat_template", None)))
    if tokenizer not in _KNOWN or _KNOWN[tokenizer][0] != state:
        _KNOWN[tokenizer] = (state, TextTokens(tokenizer, chat.literals(tokenizer)))
    return _KNOWN[tokenizer][1]
