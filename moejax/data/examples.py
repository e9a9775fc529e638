"""Queries as the model gets them, with the tokens that are trained on marked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from moejax.data.batching import assemble
from moejax.data.pipeline import Dataset
from moejax.data.preferences import SIDES
from moejax.data.tokenize import Query
from moejax.progress import Marked, Table

COUNT = 3
LONGEST_SHOWN = 600  # characters of a part
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]")


def told(dataset: Dataset, tokenizer: Any) -> list[str | Table | Marked]:
    """What is shown before training: the counts, those of each source, what is to be known of them, and examples."""
    shown = [] if tokenizer is None else examples(dataset.train.queries, tokenizer, pairs=dataset.tokenized.pairs is not None)
    return [f"data: {dataset.source}", dataset.table(), *dataset.by_source(), *dataset.notes(), *shown]


def examples(queries: Sequence[Query], tokenizer: Any, *, pairs: bool = False) -> list[Marked]:
    """The first query, one from the middle and the last; or `pairs` of queries, chosen and rejected."""
    what, sides = ("pair", [f", {side}" for side in SIDES]) if pairs else ("query", [""])
    count = len(queries) // len(sides)
    found = []
    for number in sorted({0, (count - 1) // 2, count - 1})[:COUNT]:
        for side, query in zip(sides, queries[number * len(sides) :], strict=False):
            title = f"{what} {number + 1:,} of {count:,}{side}, {len(query.ids)} tokens"
            found.append(Marked(title, shown(query, tokenizer)))
    return found


def shown(query: Query, tokenizer: Any) -> list[tuple[str, bool]]:
    """A query's parts in order, as text: read, or trained on. By the very mask that the loss takes. A part that is long is shortened."""
    batch = assemble([[query]], 1, len(query.ids))
    trained = [False, *(bool(m) for m in batch.loss_mask[0][:-1])]  # a position's mask is that of the token after it
    parts = []
    done = ""
    for is_trained, group in groupby(range(len(trained)), key=trained.__getitem__):
        places = list(group)
        text = _decoded(tokenizer, query.ids[: places[-1] + 1])
        # Some tokenizers write a token otherwise at the beginning of a text: what follows is what the whole has more.
        part = text[len(done) :] if text.startswith(done) else _decoded(tokenizer, query.ids[places[0] : places[-1] + 1])
        parts.append((_visible(_shortened(part)), is_trained))
        done = text
    return parts


def _decoded(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer.decode([int(id_) for id_ in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _shortened(text: str) -> str:
    if len(text) <= LONGEST_SHOWN:
        return text
    half = LONGEST_SHOWN // 2
    return f"{text[:half]} … ({len(text) - 2 * half:,} characters) … {text[-half:]}"


def _visible(text: str) -> str:
    """Line breaks with an arrow, and what would move a terminal's cursor or is not seen as its number."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text).replace("\n", "\u21b5\n")
