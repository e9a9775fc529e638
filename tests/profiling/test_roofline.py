"""Shares of the peaks, and Nsight Compute's percentages beside them."""

import pytest
from support import VECTORS

from moejax.errors import UserError
from moejax.profiling import roofline, xplane
from moejax.profiling.breakdown import analyze
from moejax.profiling.roofline import Peaks, time_weighted
from moejax.profiling.scopes import Place


@pytest.fixture(scope="module")
def real():
    return analyze(xplane.read(VECTORS / "mixtral-cpu.xplane.pb.gz"))


def test_shares_are_rates_over_peaks(real):
    rows = roofline.stages(real, Peaks(1e11, 1e10, "made up"))
    w1 = next(r for r in rows if r.name == "moe/w1")
    assert w1.flops_share == pytest.approx(real.cost["moe/w1"].flops / real.sums("stage")["moe/w1"] / 1e11)
    assert w1.bandwidth_share == pytest.approx(w1.bytes_per_second / 1e10)
    assert sum(r.seconds for r in rows) == pytest.approx(real.busy_seconds)
    unknown = roofline.stages(real, Peaks(None, None, "unknown"))
    assert all(r.flops_share is None and r.bandwidth_share is None for r in unknown)


def test_no_share_of_a_measured_peak_passes_one(real):
    """A matrix rate that was measured under load gives way to what a stage reached, and it is said; a data sheet's stays."""
    low = Peaks(1e9, 1e8, "measured")
    name, rate = roofline.fastest(real)
    believed = roofline.believed(real, low)
    assert rate > 1e9 and believed.flops_per_second == rate and believed.measured
    assert believed.source.startswith(f"measured under load at 1 GFLOP/s, which {name} exceeds") and "measure again" in believed.source
    rows = roofline.stages(real, believed)
    assert max(r.flops_share for r in rows) == max(r.bandwidth_share for r in rows) == 1.0
    assert next(r.flops_share for r in rows if r.name == name) == 1.0
    for good in (Peaks(1e12, 1e8, "measured"), Peaks(1e9, 1e8, "data sheet"), Peaks(None, None, "unknown")):
        assert roofline.believed(real, good) == good
    assert max(r.flops_share for r in roofline.stages(real, Peaks(1e9, 1e8, "data sheet"))) > 1


def test_a_peak_below_what_the_step_reached_is_measured_again(monkeypatch):
    from moejax import device as machine
    from moejax.training import step_profile

    rates, copies = iter((50e9, 70e9, 90e9, 95e9)), iter((5e9, 8e9))
    monkeypatch.setattr(machine, "peak_flops", lambda dtype: (next(rates), "measured"))
    monkeypatch.setattr(machine, "peak_bytes_per_second", lambda: (next(copies), "measured"))
    device = step_profile._device(60e9, "float32", 80e9)
    assert (device.peak_flops, device.peak_bytes_per_second, device.peaks_measured) == (90e9, 8e9, True) and next(rates) == 95e9


def test_time_weighting(real):
    rows = roofline.stages(real, Peaks(1e11, 1e10, "made up"))
    both = time_weighted(rows, "all")
    # The share of a sum weighted by time is the sum's own rate over the peak.
    assert both.flops_share == pytest.approx(both.flops_per_second / 1e11)
    assert both.seconds == pytest.approx(real.busy_seconds)


KERNELS = {
    "gemm": {Place("forward", "moe/w1"): 3.0, Place("forward", "moe/w2"): 1.0},
    "dequant": {Place("forward", "moe/w1_dequant"): 1.0},
}
SHARE = "throughput.avg.pct_of_peak_sustained_elapsed"
RAW = f"""==PROF== Connected to process 1
"ID","Process ID","Kernel Name","gpu__time_duration.sum","sm__{SHARE}","dram__{SHARE}"
"","","","nsecond","%","%"
"0","1","gemm","1,000","90.5","20"
"1","1","gemm","3,000","70.5","40"
"2","1","dequant","500","10","80"
"3","1","memset","500","1","1"
"""
DETAILS = '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"\n' + "".join(
    f'"{i}","{kernel}","GPU Speed Of Light Throughput","{metric}","{unit}","{value}"\n'
    for i, (kernel, *values) in enumerate([("gemm", 1, 90.5, 20), ("gemm", 3, 70.5, 40), ("dequant", 0.5, 10, 80), ("memset", 1, 1, 1)])
    for metric, unit, value in zip(("Duration", "Compute (SM) Throughput", "DRAM Throughput"), ("usecond", "%", "%"), values, strict=True)
)


@pytest.mark.parametrize("text", [RAW, DETAILS], ids=["raw", "details"])
def test_nsight_computes_percentages_by_stage(text, tmp_path):
    file = tmp_path / "report.csv"
    file.write_text(text)
    counters = roofline.ncu(file, KERNELS)
    assert counters.keys() == {"moe/w1", "moe/w2", "moe/w1_dequant"}
    assert counters["moe/w1"] == counters["moe/w2"] == pytest.approx((75.5, 35.0))
    assert counters["moe/w1_dequant"] == (10.0, 80.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("nothing here\n", "no header line"),
        ('"ID","Kernel Name","x"\n"0","gemm","1"\n', "no kernel has all of sm__throughput"),
        (RAW.replace('"gemm"', '"other"').replace('"dequant"', '"another"'), "none of its 3 kernels .* is in the trace"),
    ],
)
def test_what_is_no_report(text, message, tmp_path):
    file = tmp_path / "report.csv"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=message):
        roofline.ncu(file, KERNELS)
