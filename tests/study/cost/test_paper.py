"""The study's cost model to the digits that the study prints."""

import numpy as np
import pytest

from moejax.errors import UserError
from moejax.estimator.equations import fit_equation2, max_batch, max_batch_raw
from moejax.study import reference
from moejax.study.cost import paper, reproduce

CURVES = {c.name: c for c in reference.curves()}


@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
def test_printed_rmse_exactly(curve):
    """All seven, scored as the artifact scores them; scored alike, four of them are another number."""
    assert f"{paper.rmse_as_printed(curve):.2f}" == f"{curve.printed_rmse:.2f}"


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("fitted", (0.055, 0.022, 1.055, 0.561, 0.035, 0.104, 0.416)),
        ("printed", (0.18, 0.12, 1.26, 1.18, 0.15, 0.22, 0.58)),
    ],
)
def test_rmse_of_both_forms_scored_alike(form, expected):
    digits = 3 if form == "fitted" else 2
    assert tuple(round(paper.rmse(c, paper.fit_curve(c, form)), digits) for c in CURVES.values()) == expected


def test_the_printed_form_cannot_tell_c3_from_c4():
    curve = CURVES["a40/mixtral/commonsense_15k"]
    batch, sparsity, rate = paper.arrays(curve)
    one, other = (fit_equation2("printed", batch, sparsity, rate, c3) for c3 in (1.8, 5.0))
    np.testing.assert_allclose(one.throughput(batch, sparsity), other.throughput(batch, sparsity))
    assert one.c4 != pytest.approx(other.c4)


@pytest.mark.parametrize(("gb", "raw"), [(40, 6.06), (48, 8.98), (100, 27.92), (120, 35.20)])
def test_figure_13(gb, raw):
    """The raw values of C0 = 62 and C1 = 0.89 at 512 tokens, where 6, 8, 28 and 35 are printed."""
    assert round(max_batch_raw(gb, 23.35, 512, 0.25, 62, 0.89), 2) == raw


def test_figure_13_with_the_printed_pair():
    assert [max_batch(gb, 23.35, 512, 0.25, 82, 0.95) for gb in (40, 48, 100, 120)] == [9, 13, 42, 53]


def test_table_3_is_the_sweeps():
    """Equation 1 at the longest query gives the largest batch of each published sweep, all eight of them."""
    for row in reproduce.table_3().records():
        best = row["C0/C1 printed"] if row["C0/C1 artifact"] is None else row["C0/C1 artifact"]
        assert best == row["swept"], row
        assert row["difference"] == row["swept"] - row["printed"]


def test_table_4():
    rows = reproduce.table_4().records()
    assert [f"{r['recomputed']:.1f}" for r in rows[:3]] == ["32.7", "25.4", "17.9"]
    captions = [r["with the caption's queries"] for r in rows[:3]]
    assert [f"{usd:.1f}" for usd in captions] == ["30.6", "23.7", "16.7"]
    assert rows[3]["recomputed"] == pytest.approx(3460, abs=5)


def test_more_memory_is_never_a_smaller_batch():
    for sparsity in (0.125, 0.25, 1.0):
        batches = [max_batch(gb, 23.35, 512, sparsity, 62, 0.89) for gb in range(10, 200)]
        assert batches == sorted(batches) and batches[0] == 0


@pytest.mark.parametrize("wrong", [{"gpu_gb": -1}, {"tokens": 0}, {"sparsity": 0}])
def test_sizes_that_are_none(wrong):
    sizes = {"gpu_gb": 48, "model_gb": 23.35, "tokens": 512, "sparsity": 0.25, "c0": 62, "c1": 0.89} | wrong
    with pytest.raises(UserError, match="expected more than 0"):
        max_batch(**sizes)


def test_one_point_for_two_coefficients():
    one = np.array([1.0])
    with pytest.raises(UserError, match="1 missing"):
        fit_equation2("fitted", one, one, one, 1.8)
