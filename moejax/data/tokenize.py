"""Records to token ids, with the border between prompt and answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from moejax.data.sources import Record
from moejax.data.templates import render
from moejax.errors import UserError


class Query(NamedTuple):
    """One tokenized record. ids: int32 [n]; prompt: how many of them are prompt (not supervised)."""

    ids: np.ndarray
    prompt: int


@dataclass
class Tokenized:
    """Queries that can be trained on, and what happened to the others."""

    queries: list[Query] = field(default_factory=list)
    records: int = 0
    dropped: int = 0
    cut: int = 0


def tokenize(records: list[Record], tokenizer: Any, template: str, max_length: int) -> Tokenized:
    """Prompt and answer are encoded apart and joined, and the end of sequence appended: so the study's trainer did, and so the
    border is exact whatever the tokenizer would merge across it.

    A query longer than `max_length` is cut at its end (and counted); one with nothing supervised left is dropped (and counted).
    Raises UserError if none is left.
    """
    pairs = [render(template, record, tokenizer) for record in records]
    backend = tokenizer.backend_tokenizer
    prompts = backend.encode_batch_fast([p for p, _ in pairs], add_special_tokens=False)
    answers = backend.encode_batch_fast([a for _, a in pairs], add_special_tokens=False)
    out = Tokenized(records=len(records))
    end = [tokenizer.eos_token_id]
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = prompt.ids + answer.ids + end
        if len(ids) > max_length:
            out.cut += 1
            ids = ids[:max_length]
        # The first token is never predicted: a query needs a supervised target after it.
        if len(ids) <= max(len(prompt.ids), 1):
            out.dropped += 1
            continue
        out.queries.append(Query(np.array(ids, np.int32), len(prompt.ids)))
    if not out.queries:
        raise UserError(
            f"no query has a supervised token left: all {len(records)} answers are empty or cut off at data.max_length = {max_length}"
        )
    return out
