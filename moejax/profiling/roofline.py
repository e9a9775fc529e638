"""What each stage reached: FLOPs and bytes from the compiled program, over the measured time, beside the device's peaks.

The columns are shares of the device's peak matrix rate and memory bandwidth. They are not "SM utilization" (the share of time in which a
multiprocessor had anything to do, which the study's Figure 9 shows): that only Nsight Compute's counters can say, and `--ncu` reads
them from its CSV. Bytes are what must move if each operation reads its operands and writes its result once: caches are not known.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from moejax.errors import UserError
from moejax.profiling.breakdown import Breakdown
from moejax.profiling.scopes import Place

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
    """One stage of one step. Shares are of the peaks, None where these are unknown; percentages are Nsight Compute's, if it was asked."""

    name: str
    seconds: float
    flops: float
    bytes: float
    flops_share: float | None
    bandwidth_share: float | None
    sm_percent: float | None = None
    dram_percent: float | None = None

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


def stages(b: Breakdown, peaks: Peaks, counters: dict[str, tuple[float, float]] | None = None) -> list[Stage]:
    """Every stage, longest first. counters: stage -> (SM %, DRAM %), from `ncu`. Shares of measured peaks end at 1: what is beyond came
    from caches, or took too short to be timed."""
    cost, found = b.cost, []
    for name, seconds in b.sums("stage").items():
        c = cost.get(name)
        flops, moved = (c.flops, c.bytes) if c else (0.0, 0.0)
        sm, dram = (counters or {}).get(name, (None, None))
        found.append(
            Stage(
                name, seconds, flops, moved, _share(flops, seconds, peaks.flops_per_second, peaks.measured),
                _share(moved, seconds, peaks.bytes_per_second, peaks.measured), sm, dram,
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

    return Stage(
        name, seconds, sum(r.flops for r in rows), sum(r.bytes for r in rows),
        mean("flops_share"), mean("bandwidth_share"), mean("sm_percent"), mean("dram_percent"),
    )  # fmt: skip


# What is asked of Nsight Compute, by the names on its raw page and on its details page.
_METRICS = {
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM", "Compute (SM) Throughput": "SM",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM", "DRAM Throughput": "DRAM",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "DRAM",
    "gpu__time_duration.sum": "time", "Duration": "time",
}  # fmt: skip
_UNITS = {"second": 1.0, "s": 1.0, "msecond": 1e-3, "ms": 1e-3, "usecond": 1e-6, "us": 1e-6, "nsecond": 1e-9, "ns": 1e-9}


def ncu(path: Path, kernels: dict[str, dict[Place, float]]) -> dict[str, tuple[float, float]]:
    """Nsight Compute's CSV (`ncu --csv --page raw` or `--page details`): stage -> (SM %, DRAM %), weighted by its kernels' time.

    kernels: kernel's name -> seconds by place, from the trace of the same program (`Breakdown.kernels`): a kernel that serves several
    stages counts in each by the time that the trace gives it there. Raises UserError for a file that is not such a report, or that
    has no kernel of this trace.
    """
    measured = _launches(path)
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for name, rows in measured.items():
        places = kernels.get(name, {})
        total = sum(places.values())
        duration = sum(r[2] for r in rows)
        if not total or not duration:
            continue
        sm, dram = (sum(r[i] * r[2] for r in rows) / duration for i in (0, 1))
        for place, seconds in places.items():
            entry = sums[place.stage]
            entry[0] += sm * seconds
            entry[1] += dram * seconds
            entry[2] += seconds
    if not sums:
        known = ", ".join(sorted(kernels)[:3])
        raise UserError(
            f"{path}: none of its {len(measured)} kernels ({', '.join(sorted(measured)[:3])}, …) is in the trace ({known}, …): profile the "
            "same program with both"
        )
    return {stage: (sm / seconds, dram / seconds) for stage, (sm, dram, seconds) in sums.items()}


def _launches(path: Path) -> dict[str, list[tuple[float, float, float]]]:
    """kernel -> [(SM %, DRAM %, seconds)] of every launch."""
    how = "expected the output of `ncu --csv --page raw` with sm__throughput, dram__throughput and gpu__time_duration"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--ncu {path} cannot be read ({getattr(error, 'strerror', None) or error}): {how}") from None
    start = next((i for i, line in enumerate(lines) if line.startswith(('"ID"', "ID,"))), None)
    if start is None:
        raise UserError(f"--ncu {path}: no header line with ID and Kernel Name: {how}")
    units: dict[str, str] = {}
    launches: dict[str, tuple[str, dict[str, float]]] = {}
    for row in csv.DictReader(lines[start:]):
        if "Metric Name" in row:  # the details page: a metric a row, several rows a launch
            metrics = {row["Metric Name"]: (row["Metric Value"], row.get("Metric Unit"))}
        elif not row["ID"]:  # the raw page: a metric a column, and its units in a row before the others
            units = row
            continue
        else:
            metrics = {name: (text, units.get(name)) for name, text in row.items()}
        values = launches.setdefault(row["ID"], (row.get("Kernel Name", ""), {}))[1]
        for name, (text, unit) in metrics.items():
            if name in _METRICS:
                scale = _UNITS.get(unit or "ns", 1e-9) if _METRICS[name] == "time" else 1.0
                with suppress(ValueError, AttributeError):
                    values[_METRICS[name]] = scale * float(text.replace(",", ""))
    found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for kernel, values in launches.values():
        if len(values) == 3:
            found[kernel].append((values["SM"], values["DRAM"], values["time"]))
    if not found:
        names = [name for name in _METRICS if name.startswith(("sm__", "dram__", "gpu__time"))]
        raise UserError(f"--ncu {path}: no kernel has all of {', '.join(names)}: {how}")
    return dict(found)
