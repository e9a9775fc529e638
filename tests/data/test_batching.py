"""Rows of several queries: what a position, a segment and a target of a row are."""

import numpy as np
import pytest

from moejax.data.batching import assemble, filled, pack
from moejax.data.tokenize import Query


def test_a_packed_row_to_the_number():
    """Every query begins at position 0 in a segment of its own, and its last token predicts nothing, the next query least of all."""
    first, second = Query.after(2, np.array([11, 12, 13, 14], np.int32)), Query.after(0, np.array([21, 22, 23], np.int32))
    assert (first.prompt, second.prompt, Query(first.ids, first.supervised & False).prompt) == (2, 0, 4)
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


@pytest.mark.parametrize(
    ("low", "high", "at_most"), [(600, 760, 1.02), (390, 430, 1.02), (300, 700, 1.01), (1, 2048, 1.03), (20, 300, 1.01)]
)
def test_rows_are_few_whatever_the_lengths(low, high, at_most):
    """Against the tokens over a row's, below which nobody comes, and which not all lengths allow. Best-fit alone takes 11 % more rows
    near a third of a row."""
    lengths = np.random.default_rng(0).integers(low, high, 3000).tolist()
    rows = pack(lengths, 2048)
    assert sorted(i for row in rows for i in row) == list(range(3000))
    assert all(sum(lengths[i] for i in row) <= 2048 for row in rows)
    assert len(rows) <= at_most * -(-sum(lengths) // 2048)


def test_the_fewest_rows_of_equal_lengths_and_of_pairs():
    assert len(pack([700] * 1000, 2048)) == 500
    assert len(pack([1366, 682] * 500, 2048)) == 500
    assert len(filled([1366, 682] * 500, 2048, 100)) == 500
