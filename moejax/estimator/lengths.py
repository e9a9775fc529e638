"""Lengths of queries, and the tokens that a batch of them really computes.

A batch padded to its longest query computes batch x E[longest of batch queries] tokens, and that expectation grows with the batch:
with the study's commonsense lengths from 103 tokens a query at batch 1 to 280 at batch 20. Most of what looks like saturation of
throughput is this.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moejax.documents import read_text
from moejax.errors import UserError
from moejax.estimator import published

Batching = Literal["pad_longest", "pad_bucket", "pack", "fixed"]
STUDY_CUTOFF, STUDY_MULTIPLE = 1024, 8  # the study cut at 1024 tokens and padded to a multiple of 8
MOST = 10**9  # of queries, or of tokens in one
SMALLEST_BUCKET = 128  # of pad_bucket: 128, 256, 512 … up to the longest query, as a config's `data.buckets` begin


@dataclass(frozen=True)
class Lengths:
    """How many queries have how many tokens, ascending. `source` says whose tokens they are; `cutoff`: the study's own sets were cut
    there. Nobody else's are."""

    tokens: NDArray[np.int64]
    counts: NDArray[np.int64]
    source: str
    cutoff: int | None = None

    def __post_init__(self) -> None:
        if not len(self.tokens) or (self.tokens <= 0).any() or (self.counts < 0).any() or not self.counts.sum():
            raise UserError(f"lengths of {self.source}: expected at least one query, and every length at least 1")

    @property
    def queries(self) -> int:
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        return float(np.average(self.tokens, weights=self.counts))

    @property
    def longest(self) -> int:
        return int(self.tokens[self.counts > 0].max())

    def cut(self, row_tokens: int | None = None) -> int:
        """Where a longer query is cut: at `row_tokens`, else where the study did; without either no query is (its longest)."""
        return row_tokens or self.cutoff or self.longest

    def repeated(self, queries: int) -> Lengths:
        """The same lengths for a set of at least twice as many queries, as often as they fit into it."""
        return replace(self, counts=self.counts * max(1, queries // self.queries))

    def longer_than(self, tokens: int) -> int:
        """Queries of more tokens."""
        return int(self.counts[self.tokens > tokens].sum())

    @staticmethod
    def padded(tokens: ArrayLike, multiple: int, buckets: bool) -> NDArray[np.int64]:
        """Lengths rounded up to a multiple, or to a bucket."""
        lengths = np.asarray(tokens, np.int64)
        return _bucket(lengths) if buckets else -(-lengths // multiple) * multiple

    def expected_longest(
        self, batch: int, *, multiple: int = STUDY_MULTIPLE, row_tokens: int | None = None, buckets: bool = False
    ) -> float:
        """E[longest of `batch` queries drawn without replacement], each cut (see `cut`) and rounded up to `multiple` or to a bucket.

        Exact: with F queries of N no longer than x, P(longest <= x) = product over i < batch of (F - i)/(N - i). A batch of more
        queries than there are is refused.
        """
        _positive(batch=batch, multiple=multiple)
        n = self.queries
        if batch > n:
            raise UserError(f"a batch of {batch} queries: {self.source} has {n}")
        kept = np.minimum(self.tokens, self.cut(row_tokens))
        padded = self.padded(kept, multiple, buckets)
        below = np.cumsum(self.counts).astype(float)
        at_most = np.ones_like(below)
        step = max(1, (1 << 20) // len(below))
        for start in range(0, batch, step):  # all at once would be lengths x batch numbers
            i = np.arange(start, min(start + step, batch), dtype=float)
            at_most *= np.prod(np.maximum(below[:, None] - i, 0.0) / (n - i), axis=1)
        return float(np.diff(at_most, prepend=0.0) @ padded)

    def batch_tokens(
        self, batch: int, batching: Batching = "pad_longest", *, row_tokens: int | None = None, multiple: int = STUDY_MULTIPLE
    ) -> float:
        """Expected tokens that a step with `batch` queries computes, padding included; a query is cut at `row_tokens` (see `cut`).

        "pad_longest": every query as long as the batch's longest. "pad_bucket": as the smallest bucket that holds that. "fixed": every
        query `row_tokens` long. "pack": the queries' own tokens.
        """
        _positive(batch=batch)
        if batching in ("pad_longest", "pad_bucket"):
            buckets = batching == "pad_bucket"
            return batch * self.expected_longest(batch, multiple=multiple, row_tokens=row_tokens, buckets=buckets)
        if batching == "fixed":
            if row_tokens is None or row_tokens < 1:
                raise UserError(f"--batching fixed: how many tokens has a row? Give --seq-len (it is {row_tokens}), at least 1")
            return float(batch * row_tokens)
        if batching not in get_args(Batching):
            raise UserError(f"batching {batching!r}: expected one of {', '.join(get_args(Batching))}")
        return batch * float(np.average(np.minimum(self.tokens, self.cut(row_tokens)), weights=self.counts))


def _bucket(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """The smallest of 128, 256, 512 … that holds this many tokens."""
    return np.array([SMALLEST_BUCKET << max(0, math.ceil(math.log2(n / SMALLEST_BUCKET))) for n in tokens.tolist()], np.int64)


def _positive(**sizes: float) -> None:
    for name, value in sizes.items():
        if not value >= 1:
            raise UserError(f"{name} = {value}: expected at least 1")


@cache
def of_study(dataset: str) -> Lengths:
    """Figure 2's lengths in GPT-NeoX's tokens. Of "hellaswag" and "gsm8k" it prints no more than the median: every query has it."""
    printed = published.read("lengths.json")[dataset]
    if has_lengths(dataset):
        tokens, counts = zip(*printed["lengths"], strict=True)
        return Lengths(np.array(tokens), np.array(counts), f"{dataset}, the study's figure 2 (GPT-NeoX tokens)", STUDY_CUTOFF)
    tokens = printed["median_tokens"]
    source = f"{dataset}, every query at its median of {tokens} tokens: no padding is seen"
    return Lengths(np.array([tokens]), np.array([printed["queries"]]), source, STUDY_CUTOFF)


def has_lengths(dataset: str) -> bool:
    """Whether it is one of the study's data sets of which every length is known."""
    return "lengths" in published.read("lengths.json").get(dataset, {})


def constant(queries: int, tokens: int) -> Lengths:
    """`queries` of one length: no padding, whatever the batch."""
    _positive(records=queries, length=tokens)
    for name, value in (("records", queries), ("length", tokens)):
        if value > MOST:
            raise UserError(f"{name} = {value:,}: expected at most {MOST:,}")
    return Lengths(np.array([tokens]), np.array([queries]), f"{queries:,} {'queries' if queries > 1 else 'query'} of {tokens:,} tokens")


def from_file(path: str | Path) -> Lengths:
    """Lengths from a file: a JSON list of numbers, or one number a line. Raises UserError for anything else."""
    path = Path(path)
    text = read_text(path, "--lengths ")
    expected, listed = "expected a JSON list of tokens per query, or one number a line", text.lstrip().startswith("[")
    try:
        values = json.loads(text, parse_int=float) if listed else text.split()
    except (ValueError, RecursionError) as error:
        why = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise UserError(f"--lengths {path}: {expected} ({why})") from error
    if not values:
        raise UserError(f"--lengths {path} is empty: {expected}")
    none = next((json.dumps(value) if listed else value for value in values if not _a_number(value, listed)), None)
    if none is not None:
        record = " (records of a data set? `moejax train CONFIG --dry-run` counts their tokens)" if none.startswith(("{", '{"')) else ""
        raise UserError(f"--lengths {path}: {expected}, found {none[:40]}{record}")
    lengths = np.array(values, float)
    wrong = np.flatnonzero(~((lengths >= 1) & (lengths <= MOST) & (lengths == np.round(lengths))))
    if len(wrong):
        raise UserError(
            f"--lengths {path}: number {wrong[0] + 1} of {len(lengths)} is {lengths[wrong[0]]:g}: expected whole numbers of 1 to {MOST:,} "
            f"tokens, one a query{f' ({len(wrong)} are not)' if len(wrong) > 1 else ''}"
        )
    tokens, counts = np.unique(lengths.astype(np.int64), return_counts=True)
    return Lengths(tokens, counts, f"{path.name}, {len(lengths):,} {'queries' if len(lengths) > 1 else 'query'}")


def _a_number(value: Any, listed: bool) -> bool:
    if listed:
        return isinstance(value, float)
    try:
        float(value)
    except ValueError:
        return False
    return True
