"""What each stage reached: FLOPs and bytes from the compiled program, over the measured time, next to the device's peaks.

The columns are shares of the device's peak matrix rate and memory bandwidth. They are not "SM utilization" (the share of time in which a
multiprocessor had anything to do, which the study's Figure 9 shows): that only Nsight Compute's counters can say. Bytes are what must move
if each operation reads its operands and writes its result once: caches are not known.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from moejax.profiling.breakdown import Breakdown

WORTH_TIMING = 0.01  # of the busy time


@dataclass(frozen=True)
class Peaks:
    """Of the device: FLOP/s of matrix products in the step's precision, bytes/s of its memory; None where unknown."""

    flops_per_second: float | None
    bytes_per_second: float | None
    source: str  # "data sheet", "measured", …

    @property
    def measured(self) -> bool:
        return self.source.startswith("measured")


@dataclass(frozen=True)
class Stage:
    """One stage of one step. Shares are of the peaks, None where these are unknown."""

    name: str
    seconds: float
    flops: float
    bytes: float
    flops_share: float | None
    bandwidth_share: float | None

    @property
    def flops_per_second(self) -> float:
        return self.flops / self.seconds if self.seconds else 0.0

    @property
    def bytes_per_second(self) -> float:
        return self.bytes / self.seconds if self.seconds else 0.0


def fastest(b: Breakdown) -> tuple[str, float]:
    """(stage, FLOP/s) of the highest rate among stages that take at least 1 % of the busy time: shorter ones are too short to time."""
    rates = {
        name: b.cost[name].flops / seconds
        for name, seconds in b.sums("stage").items()
        if name in b.cost and seconds > WORTH_TIMING * b.busy_seconds
    }
    name = max(rates, key=lambda n: rates[n], default="")
    return name, rates.get(name, 0.0)


def believed(b: Breakdown, peaks: Peaks) -> Peaks:
    """A measured matrix rate that a stage exceeds was measured while the device had other work: the stage's own rate is taken, and said."""
    name, rate = fastest(b)
    if not peaks.measured or peaks.flops_per_second is None or rate <= peaks.flops_per_second:
        return peaks
    why = (
        f"measured under load at {peaks.flops_per_second / 1e9:.0f} GFLOP/s, which {name} exceeds; its rate is taken: measure again by "
        "profiling on a machine that does nothing else"
    )
    return replace(peaks, flops_per_second=rate, source=why)


def stages(b: Breakdown, peaks: Peaks) -> list[Stage]:
    """Every stage, longest first. Shares of measured peaks end at 1: what is beyond came from caches, or took too short to be timed."""
    cost, found = b.cost, []
    for name, seconds in b.sums("stage").items():
        c = cost.get(name)
        flops, moved = (c.flops, c.bytes) if c else (0.0, 0.0)
        found.append(
            Stage(
                name, seconds, flops, moved, _share(flops, seconds, peaks.flops_per_second, peaks.measured),
                _share(moved, seconds, peaks.bytes_per_second, peaks.measured),
            )
        )  # fmt: skip
    return found


def _share(amount: float, seconds: float, peak: float | None, measured: bool) -> float | None:
    share = None if not peak or not seconds else amount / seconds / peak
    return share if share is None or not measured else min(1.0, share)


def time_weighted(rows: Iterable[Stage], name: str) -> Stage:
    """Several stages as one: shares weighted by time, as the study's Figures 9 and 10 do."""
    rows = list(rows)
    seconds = sum(r.seconds for r in rows)

    def mean(field: str) -> float | None:
        known = [(getattr(r, field), r.seconds) for r in rows if getattr(r, field) is not None and r.seconds]
        total = sum(s for _, s in known)
        return sum(v * s for v, s in known) / total if total else None

    return Stage(name, seconds, sum(r.flops for r in rows), sum(r.bytes for r in rows), mean("flops_share"), mean("bandwidth_share"))
