"""The batch that a step takes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Rows of tokens, each array [rows, T] (or [A, rows, T]: A micro-batches). numpy on the host, jax on the device.

    tokens: int32. targets: int32, the token that each position must predict (the next one of the same query). loss_mask: fp32,
    1 where that target is supervised (the answer and the end of sequence), 0 on prompts and padding. segment_ids: int32, 1, 2, …
    for the queries of a row, 0 on padding. positions: int32, from 0 in every query.
    """

    tokens: Any
    targets: Any
    loss_mask: Any
    segment_ids: Any
    positions: Any


class PairBatch(NamedTuple):
    """Rows of the sides of preferences: as `Batch`, with `loss_mask` 1 where a token of an answer is predicted, and `sides`: int32, of the
    micro-batch's pair p (from 0) 2p + 1 on the chosen side, 2p + 2 on the rejected one, 0 on padding. Both sides lie in one micro-batch.
    """

    tokens: Any
    targets: Any
    loss_mask: Any
    segment_ids: Any
    positions: Any
    sides: Any


def segment_lengths(segment_ids: np.ndarray) -> list[int]:
    """Tokens of every query in the rows [..., T]; 0 is padding."""
    lengths: list[int] = []
    for row in segment_ids.reshape(-1, segment_ids.shape[-1]):
        counts = np.bincount(row)[1:]
        lengths.extend(int(n) for n in counts if n)
    return lengths
