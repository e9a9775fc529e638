"""Rows of several queries: what a position, a segment and a target of a row are."""

import numpy as np

from moejax.data.batching import assemble
from moejax.data.tokenize import Query


def test_a_packed_row_to_the_number():
    """Every query begins at position 0 in a segment of its own, and its last token predicts nothing, the next query least of all."""
    first, second = Query.after(2, np.array([11, 12, 13, 14], np.int32)), Query.after(0, np.array([21, 22, 23], np.int32))
    row = assemble([[first, second]], 1, 8)
    assert row.tokens.tolist() == [[11, 12, 13, 14, 21, 22, 23, 0]]
    assert row.targets.tolist() == [[12, 13, 14, 0, 22, 23, 0, 0]]
    assert row.loss_mask.tolist() == [[0, 1, 1, 0, 1, 1, 0, 0]]
    assert row.segment_ids.tolist() == [[1, 1, 1, 1, 2, 2, 2, 0]]
    assert row.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]


def test_several_answers_of_one_query():
    """A conversation's: the mask is that of the next token, whatever stands between the answers."""
    talk = Query(np.arange(1, 8, dtype=np.int32), np.array([True, False, True, True, False, False, True]))
    row = assemble([[talk]], 1, 8)
    assert row.loss_mask.tolist() == [[0, 1, 1, 0, 0, 1, 0, 0]]
