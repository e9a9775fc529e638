"""The study's numbers as its text and figures state them."""

import numpy as np
import pytest

from moejax.study import reference


def test_curves_are_the_figures():
    curves = {c.name: c for c in reference.curves()}
    assert len(curves) == 7 and sum(len(c.points) for c in curves.values()) == 96
    assert curves["h100-80gb/mixtral"].points[-1] == ("sparse", 17, 4.89877178)
    assert curves["a40/blackmamba/math_14k"].kind("dense") == ((1, 2.218754555), (2, 3.231858367), (3, 5.321407704))
    assert {c.c3 for c in curves.values() if c.model == "mixtral"} == {1.8}
    assert curves["a100-40gb/mixtral"].dataset is None


@pytest.mark.parametrize(("table", "rows"), [("stage_seconds", 10), ("layer_seconds", 10), ("kernel_microseconds", 10)])
def test_every_setting_of_a_figure_is_read(table, rows):
    assert len(getattr(reference, table)().rows) == rows


def test_columns_meet_their_numbers():
    assert reference.stage_seconds().row("mixtral", "sparse", 32).values == {"forward": 2.34, "backward": 4.51, "optimizer": 0.05}
    assert reference.layer_seconds().row("blackmamba", "dense", 30).values["mamba"] == 0.10589
    assert reference.kernel_microseconds().row("mixtral", "dense", 10).values["w2_dequant"] == 358.78
    assert reference.sm_percent().row("mixtral", "sparse", 10).values["time_weighted"] == 76.8
    assert reference.dram_percent().row("blackmamba", "sparse", 84).values["gelu"] == 81.96363673
    latency = reference.sequence_length_sensitivity("latency_seconds")
    assert latency.row("mixtral", "dense").values["64"] == 6.862480433


def test_a_setting_that_the_study_has_not_is_refused():
    with pytest.raises(KeyError, match="Figure 4 has no row mixtral, dense, batch 2"):
        reference.stage_seconds().row("mixtral", "dense", 2)


@pytest.mark.parametrize(
    ("dataset", "queries", "mean", "median"), [("commonsense_15k", 15119, 99.9, 79), ("math_14k", 13921, 187.3, 174)]
)
def test_histograms(dataset, queries, mean, median):
    """Figure 2 holds about as many queries as the data set, and its median is the one that Table II prints."""
    tokens, counts = zip(*reference.length_histogram(dataset), strict=True)
    assert sum(counts) == queries
    assert np.average(tokens, weights=counts) == pytest.approx(mean, abs=0.05)
    assert np.median(np.repeat(tokens, counts)) == median == reference.raw()["table2_datasets"][dataset]["median_seq_len"]


def test_printed_variances_follow_from_figure_11():
    """Of the counts, not of shares; over 8 experts in three of Mixtral's, over 7 degrees of freedom in the other five."""
    for (model, data), printed in reference.printed_variance().items():
        over_8 = model == "mixtral" and data != "HE"
        counts = reference.tokens_per_expert()[model, data]
        assert round(float(np.var(counts, ddof=0 if over_8 else 1)), 1) == printed, (model, data)


def test_table_3_and_the_sweeps():
    rows = {(m.model, m.dataset, m.kind): (m.printed, m.swept) for m in reference.max_batches()}
    assert rows["mixtral", "math_14k", "sparse"] == (3, 4)
    assert rows["blackmamba", "math_14k", "sparse"] == (8, 10)
    assert sum(printed != swept for printed, swept in rows.values()) == 3


def test_figure_13_and_table_4():
    figure = reference.max_batch_figure()
    assert figure.ground_truth == {40: 6, 48: 8, 80: 27} and figure.printed_projection == {100: 28, 120: 35}
    assert figure.artifact["mixtral"] == (62, 0.89) and figure.printed["blackmamba"] == (83, 0.88)
    assert [row.usd for row in reference.cost_table()] == [32.7, 25.4, 17.9]
