"""Queries to batches: packed, padded, or synthetic; the same order for the same seed and epoch."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from moejax.config_data import ROW_MULTIPLE, DataConfig, whole_row
from moejax.data.batch import Batch, PairBatch
from moejax.data.tokenize import Query
from moejax.errors import UserError

AnyBatch = TypeVar("AnyBatch", Batch, PairBatch)


class Batches:
    """All micro-batches of every epoch. What an epoch holds depends only on the queries, the config, the seed and its number.

    weights: (how many of the queries, in order, are of a source, its weight); none: every query is seen once an epoch. pairs: queries are
    the sides of preferences in turn, chosen and rejected, which stay together: in a row of `pack`, else in two that follow each other.
    """

    def __init__(
        self, queries: Sequence[Query], config: DataConfig, seed: int, *, shuffle: bool | None = None,
        weights: Sequence[tuple[int, float]] = (), pairs: bool = False,
    ):  # fmt: skip
        self.queries, self.config, self.seed = queries, config, seed
        self.lengths = np.fromiter((len(query.ids) for query in queries), np.int32, len(queries))
        self.together = 2 if pairs else 1  # queries that stay together
        self.weights = tuple((count // self.together, weight) for count, weight in weights)
        self.shuffle = config.shuffle if shuffle is None else shuffle
        self._rows = lru_cache(maxsize=2)(self._make_rows)

    def batches_per_epoch(self, epoch: int) -> int:
        return len(self._micro_batches(epoch))

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """The micro-batches (Batch, or PairBatch) of an epoch from number `start`. A last one that is not full has empty rows."""
        for rows in self._micro_batches(epoch)[start:]:
            batch = assemble([[self.queries[i] for i in row] for row in rows], self.config.batch_rows, self._row_tokens(rows))
            yield batch if self.together == 1 else paired(batch)

    def row_tokens(self, epoch: int) -> list[int]:
        """Tokens of the rows of each micro-batch of an epoch."""
        return [self._row_tokens(rows) for rows in self._micro_batches(epoch)]

    def waste(self) -> float:
        """Share of the computed tokens that is padding, in the first epoch."""
        micro = self._micro_batches(0)
        computed = sum(len(rows) * self._row_tokens(rows) for rows in micro)
        return 1 - sum(int(self.lengths[row].sum()) for rows in micro for row in rows) / computed

    def longest_row(self) -> int:
        """Tokens of the longest row of any epoch."""
        return self._row_tokens([list(range(len(self.queries)))])

    def rows(self) -> int:
        """Of the first epoch."""
        return len(self._rows(0))

    def _micro_batches(self, epoch: int) -> list[list[list[int]]]:
        """The queries' numbers, row by row."""
        rows, n = self._rows(epoch), self.config.batch_rows
        return [rows[first : first + n] for first in range(0, len(rows), n)]

    def _make_rows(self, epoch: int) -> list[list[int]]:
        order = self._seen(epoch)
        random = np.random.default_rng([self.seed, epoch])
        if self.shuffle:
            random.shuffle(order)
        n = self.together
        if self.config.batching != "pack":
            return [[n * int(i) + side] for i in order for side in range(n)]
        packed = pack(self.lengths.reshape(-1, n)[order].sum(axis=1).tolist(), self.config.row_tokens)
        if self.shuffle:
            random.shuffle(packed)
        return [[n * int(order[i]) + side for i in row for side in range(n)] for row in packed]

    def _seen(self, epoch: int) -> np.ndarray:
        """The queries of an epoch, in order. Those of a source stand in one shuffled circle, in which each epoch goes on where the last one
        ended: after any number of epochs every record has been seen equally often, but for one time."""
        if all(weight == 1 for _, weight in self.weights):
            return np.arange(len(self.queries) // self.together)
        found, first = [], 0
        for number, (count, weight) in enumerate(self.weights):
            circle = np.random.default_rng([self.seed, number, count]).permutation(count)
            begin, end = (int(e * weight * count + 1e-6) for e in (epoch, epoch + 1))
            found.append(np.sort(first + circle[np.arange(begin, end) % max(count, 1)]))
            first += count
        return np.concatenate(found)

    def _row_tokens(self, rows: list[list[int]]) -> int:
        c = self.config
        if c.batching in ("pack", "fixed"):
            return c.longest_row
        longest = max(int(self.lengths[row].max()) for row in rows)
        return whole_row(min(b for b in c.buckets if b >= longest) if c.batching == "pad_bucket" else longest)


class GivenBatches:
    """Batches that a caller made, with what a run asks of `Batches`. given: the same for every epoch, or a function of its number.

    Raises UserError where they are none, differ in rows, or have rows of no multiple of 16 tokens.
    """

    queries: Sequence[Query] = ()

    def __init__(self, given: Sequence[Batch] | Callable[[int], Sequence[Batch]]):
        self._of = lru_cache(maxsize=2)(self._checked)
        self._given = given
        self.batch_rows = self._of(0)[0].tokens.shape[0]
        self.longest = max(self.row_tokens(0))

    def _checked(self, epoch: int) -> list[Batch]:
        batches = list(self._given(epoch) if callable(self._given) else self._given)
        if not batches:
            raise UserError(f"batches: epoch {epoch} has none")
        rows = batches[0].tokens.shape[0]
        for number, batch in enumerate(batches):
            shapes = {np.shape(part) for part in batch}
            if len(shapes) != 1 or batch.tokens.ndim != 2:
                raise UserError(f"batches: number {number} of epoch {epoch}: expected arrays [rows, T] of one shape, got {sorted(shapes)}")
            if batch.tokens.shape[0] != rows or batch.tokens.shape[1] % ROW_MULTIPLE:
                raise UserError(
                    f"batches: number {number} of epoch {epoch} is {list(batch.tokens.shape)}: expected {rows} rows like the first one, "
                    f"of a multiple of {ROW_MULTIPLE} tokens"
                )
        return batches

    def batches_per_epoch(self, epoch: int) -> int:
        return len(self._of(epoch))

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        return iter(self._of(epoch)[start:])

    def row_tokens(self, epoch: int) -> list[int]:
        return [batch.tokens.shape[1] for batch in self._of(epoch)]

    def rows(self) -> int:
        return self.batch_rows * self.batches_per_epoch(0)

    def waste(self) -> float:
        """Share of the first epoch's tokens that is padding."""
        return float(np.mean([np.mean(batch.segment_ids == 0) for batch in self._of(0)]))

    def content(self) -> str:
        """Hash of the first epoch's."""
        digest = hashlib.sha256()
        for part in (np.ascontiguousarray(part) for batch in self._of(0) for part in batch):
            digest.update(f"{part.dtype}{part.shape}".encode() + part.tobytes())
        return digest.hexdigest()


def pack(lengths: Sequence[int], row_tokens: int, window: int = 2048) -> list[list[int]]:
    """Indices of `lengths` for each row, every query whole, in rows of at most `row_tokens`.

    By best-fit decreasing; where that leaves more than 1 % of the tokens empty and `filled` does better with the first of them, which takes
    longer, by that.
    """
    rows = best_fit(lengths, row_tokens, window)
    if len(rows) * row_tokens <= 1.01 * sum(lengths) + row_tokens:
        return rows
    some = lengths[: 2 * window]
    if len(some) < len(lengths) and len(filled(some, row_tokens, 4 * window)) > 0.995 * len(best_fit(some, row_tokens, window)):
        return rows
    return min(rows, filled(lengths, row_tokens, 4 * window), key=len)


def filled(lengths: Sequence[int], row_tokens: int, window: int) -> list[list[int]]:
    """As `pack`: each row gets the longest query that is left, and of the others those that fill it best (a subset sum, longest first).

    So lengths near a third or a fifth of a row are packed, of which best-fit puts one too few into a row. A row of a window that has room
    for more takes part in the next.
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for start in range(0, len(lengths), window):
        left += range(start, min(start + window, len(lengths)))
        by_length: dict[int, list[int]] = {}
        for index in reversed(left):
            by_length.setdefault(lengths[index], []).append(index)
        last = start + window >= len(lengths)
        left = []
        while by_length:
            longest = max(by_length)
            chosen = [longest, *_best_sum(by_length, longest, row_tokens - longest)]
            row = []
            for length in chosen:
                row.append(by_length[length].pop())
                if not by_length[length]:
                    del by_length[length]
            if last or sum(chosen) * 100 >= 99 * row_tokens:
                rows.append(row)
            else:
                left += row
    return rows


def _best_sum(by_length: dict[int, list[int]], used: int, room: int) -> list[int]:
    """The lengths of other queries that fill `room` best, where one of length `used` is taken already."""
    reached, steps, full = 1, [], (1 << room + 1) - 1  # bit s: a sum of s is possible
    for length in sorted((length for length in by_length if length <= room), reverse=True):
        for _ in range(min(len(by_length[length]) - (length == used), room // length)):
            steps.append((length, reached))
            reached |= reached << length & full
            if reached >> room:
                break
        if reached >> room:
            break
    total, chosen = reached.bit_length() - 1, []
    for length, before in reversed(steps):
        if not before >> total & 1:
            chosen.append(length)
            total -= length
    return chosen


def best_fit(lengths: Sequence[int], row_tokens: int, window: int) -> list[list[int]]:
    """As `pack`, by best-fit decreasing.

    Inside a window of queries (in the order given, so that rows stay as random as the shuffle) the longest go first, each into the
    fullest open row that still has room: best-fit decreasing. Rows that a window leaves open stay open for the next.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room left, row), sorted
    for start in range(0, len(lengths), window):
        for index in sorted(range(start, min(start + window, len(lengths))), key=lambda i: (-lengths[i], i)):
            need = lengths[index]
            at = bisect.bisect_left(open_rows, (need, -1))
            if at == len(open_rows):
                rows.append([])
                room, row = row_tokens, len(rows) - 1
            else:
                room, row = open_rows.pop(at)
            rows[row].append(index)
            bisect.insort(open_rows, (room - need, row))
    return rows


def assemble(rows: Sequence[Sequence[Query]], row_count: int, row_tokens: int) -> Batch:
    """Queries, row by row, into arrays [row_count, row_tokens]; what is not filled is padding."""
    shape = (row_count, row_tokens)
    tokens, targets, segments, positions = (np.zeros(shape, np.int32) for _ in range(4))
    mask = np.zeros(shape, np.float32)
    for r, row in enumerate(rows):
        at = 0
        for segment, query in enumerate(row, 1):
            n = len(query.ids)
            here = slice(at, at + n)
            tokens[r, here] = query.ids
            targets[r, at : at + n - 1] = query.ids[1:]
            # Position t predicts token t + 1: the last prompt position predicts the first token of the answer.
            mask[r, at : at + n - 1] = query.supervised[1:]
            segments[r, here] = segment
            positions[r, here] = np.arange(n)
            at += n
    return Batch(tokens, targets, mask, segments, positions)


def paired(batch: Batch) -> PairBatch:
    """A micro-batch [rows, T] of the sides of preferences in turn, row by row, with which side each token is of."""
    first = np.cumsum([0, *(row.max() for row in batch.segment_ids)])[:-1, None]  # sides in the rows before
    return PairBatch(*batch, np.where(batch.segment_ids > 0, batch.segment_ids + first, 0).astype(np.int32))


def stack(micro: Sequence[AnyBatch], count: int) -> AnyBatch:
    """Micro-batches [rows, T] to one batch [count, rows, T]: padded to the longest, and with empty ones where fewer came."""
    rows, longest = micro[0].tokens.shape[0], max(b.tokens.shape[1] for b in micro)

    def join(arrays: list[np.ndarray]) -> np.ndarray:
        out = np.zeros((count, rows, longest), arrays[0].dtype)
        for i, a in enumerate(arrays):
            out[i, :, : a.shape[1]] = a
        return out

    return type(micro[0])(*(join(list(arrays)) for arrays in zip(*micro, strict=True)))


def synthetic(config: DataConfig, vocab_size: int, seed: int, rows: int) -> list[Query]:
    """Random tokens in rows of one length, all supervised: for hardware studies."""
    random = np.random.default_rng([seed, 0])
    ids = random.integers(0, vocab_size, (rows, config.row_tokens), np.int32)
    return [Query.after(0, row) for row in ids]
