"""Shares of the peaks."""

import pytest
from support import VECTORS

from moejax.profiling import roofline, xplane
from moejax.profiling.breakdown import analyze
from moejax.profiling.roofline import Peaks, time_weighted


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
