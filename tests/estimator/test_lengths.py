"""Tokens that a batch computes, against drawing batches."""

import itertools

import numpy as np
import pytest

from moejax.errors import UserError
from moejax.estimator import lengths
from moejax.estimator.lengths import Lengths


def test_the_studys_rows():
    """Tokens a query at batch 1, 2, 4, 8, 20 (commonsense) and 1, 2, 4, 8 (MATH)."""
    for name, expected in (("commonsense_15k", {1: 103, 2: 132, 4: 170, 8: 217, 20: 280}), ("math_14k", {1: 191, 2: 226, 4: 264, 8: 303})):
        found = {b: round(lengths.of_study(name).expected_longest(b)) for b in expected}
        assert found == expected


def test_exact_by_counting_every_batch():
    """Against all subsets of a small set, without replacement; rounding to 8 and the cut in place."""
    values = [3, 9, 9, 17, 30, 41, 100]
    tokens, counts = np.unique(values, return_counts=True)
    small = Lengths(tokens, counts, "test")
    for batch in range(1, len(values) + 1):
        longest = [min(64, -(-max(s) // 8) * 8) for s in itertools.combinations(values, batch)]
        assert small.expected_longest(batch, row_tokens=64) == pytest.approx(np.mean(longest))


def test_one_length_has_no_padding_but_the_multiple():
    assert lengths.constant(100, 128).batch_tokens(7) == 7 * 128
    assert lengths.constant(100, 129).batch_tokens(1) == 136
    assert lengths.constant(100, 5000).batch_tokens(2) == 2 * 5000


def test_the_studys_cut_is_for_its_own_sets():
    """A user's queries are as long as they are, in every batching; the study's are cut at 1024, or where --seq-len says."""
    long = lengths.constant(100, 4096)
    for batching in ("pad_longest", "pad_bucket", "pack"):
        assert long.batch_tokens(3, batching) == 3 * 4096
        assert long.batch_tokens(3, batching, row_tokens=1024) == 3 * 1024
    tail = Lengths(np.array([100, 8000]), np.array([90, 10]), "test")
    assert tail.expected_longest(1) == pytest.approx(0.9 * 104 + 0.1 * 8000)
    assert tail.batch_tokens(10, "pack") == pytest.approx(10 * (0.9 * 100 + 0.1 * 8000))
    assert tail.longer_than(1024) == 10 and tail.cut() == 8000
    math = lengths.of_study("math_14k")
    assert math.cut() == 1024 and math.cut(2048) == 2048 and math.longest > 1024
    own = Lengths(math.tokens, math.counts, "the same lengths, a user's")
    assert own.batch_tokens(8) > math.batch_tokens(8) and own.batch_tokens(8, row_tokens=1024) == math.batch_tokens(8)


def test_a_batch_in_a_bucket_is_as_long_as_the_bucket_of_its_longest():
    small = Lengths(np.array([3, 129, 1500]), np.array([1, 1, 1]), "test")
    assert small.expected_longest(1, buckets=True) == pytest.approx((128 + 256 + 2048) / 3)
    assert small.batch_tokens(2, "pad_bucket") == pytest.approx(2 * (256 + 2048 + 2048) / 3)
    assert lengths.constant(5, 128).batch_tokens(1, "pad_bucket") == 128


def test_packing_computes_the_queries_own_tokens():
    study = lengths.of_study("commonsense_15k")
    assert study.batch_tokens(10, "pack") == pytest.approx(10 * study.mean)
    assert study.batch_tokens(10, "pack") < study.batch_tokens(10, "pad_longest")
    assert study.batch_tokens(10, "fixed", row_tokens=128) == 1280


def test_files(tmp_path):
    for name, text in (("a.json", "[5, 7, 5]"), ("a.txt", "5\n7\n5\n")):
        (tmp_path / name).write_text(text)
        found = lengths.from_file(tmp_path / name)
        assert (found.tokens.tolist(), found.counts.tolist(), found.queries) == ([5, 7], [2, 1], 3)


def test_a_length_that_is_none_is_named(tmp_path):
    path = tmp_path / "lengths.txt"
    path.write_text("12\n0\n7\n-1\n")
    with pytest.raises(UserError, match=r"number 2 of 4 is 0: expected whole numbers of 1 to 1,000,000,000 tokens, .*\(2 are not\)"):
        lengths.from_file(path)
    for size in ({"queries": 10**20, "tokens": 5}, {"queries": 5, "tokens": 10**20}):
        with pytest.raises(UserError, match="expected at most 1,000,000,000"):
            lengths.constant(**size)


@pytest.mark.parametrize("text", ["", "[]", "a\n", "1.5\n", "-3\n", "[[1], [2]]", '["3"]', "[true]", "[null]", "nan", "1e400"])
def test_files_of_something_else(tmp_path, text):
    path = tmp_path / "lengths"
    path.write_text(text)
    with pytest.raises(UserError, match="lengths"):
        lengths.from_file(path)


def test_bad_sizes():
    small = lengths.constant(10, 64)
    for call in (
        lambda: small.batch_tokens(0),
        lambda: small.batch_tokens(11),
        lambda: small.batch_tokens(1, "fixed"),
        lambda: small.batch_tokens(1, "rows"),
        lambda: lengths.constant(0, 64),
        lambda: lengths.constant(5, -1),
        lambda: Lengths(np.array([0, 3]), np.array([1, 1]), "test"),
    ):
        with pytest.raises(UserError):
            call()
