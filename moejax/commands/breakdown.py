"""`moejax breakdown RUN…`: print tables, draw figures and list takeaways."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from moejax.errors import UserError
from moejax.estimator.units import counted
from moejax.profiling import roofline, schema, torch_trace, traced, xplane
from moejax.profiling.bars import Bars, draw, study, takeaways
from moejax.profiling.breakdown import Breakdown, analyze
from moejax.profiling.roofline import Peaks, Stage
from moejax.profiling.scopes import COLLECTIVES
from moejax.profiling.times import Times
from moejax.terminal import Console, figures

WIDE = 132  # characters that the whole table of stages takes
NO_PEAKS = Peaks(None, None, "unknown")
STUDY_EXPERTS = 8  # of both of the study's models


@dataclass(frozen=True)
class Run:
    """A run's bars; and its trace's breakdown and stages where there is a trace (a PyTorch run brings step_profile.json alone). profile:
    its step_profile.json, where there is one."""

    bars: Bars
    breakdown: Breakdown | None = None
    stages: list[Stage] = field(default_factory=list)
    peaks: Peaks = NO_PEAKS
    profile: schema.StepProfile | None = None

    @property
    def collectives(self) -> dict[str, schema.Collective]:
        """By kind."""
        if self.breakdown is None:
            return (self.profile.collectives if self.profile else None) or {}
        return self.breakdown.profiled_collectives

    @property
    def imbalance(self) -> dict[str, float]:
        """Layer -> load of the busiest device over the mean one's, where devices hold experts of their own."""
        p = self.profile
        return {} if p is None or p.mode != "experts" or not p.expert_load else traced.imbalance(p.expert_load, p.devices)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a profiled run, an *.xplane.pb or a step_profile.json")
    parser.add_argument("--out", default=None, metavar="DIR", help="folder for the figures (default: RUN/breakdown)")
    parser.add_argument(
        "--reference",
        choices=("match", "all", "none"),
        default="match",
        help="which of the study's results to show: those of the same model and k (default), all, or none",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables and figures")


def run(options: argparse.Namespace) -> int:
    """Print the tables of these runs (folders, traces or step_profile.json files) and draw the figures. Raises UserError."""
    loaded = [load(Path(p)) for p in options.runs]
    folder = Path(options.out) if options.out else _default_folder(Path(options.runs[0]))
    bars = [r.bars for r in loaded]
    matching = (setting for r in loaded if (setting := _setting(r)) is not None)
    settings = {"match": list(dict.fromkeys(matching)), "all": _ALL, "none": []}[options.reference]
    bars += [b for model, kind in settings for b in study(model, kind)]
    if options.json:
        json.dump([as_dict(r) for r in loaded], sys.stdout, indent=1)
        print()
        return 0
    console = Console(WIDE)
    for r in loaded:
        _print(r, console)
    console.print(_takeaways(bars))
    for file in draw(bars, folder):
        if file.suffix == ".png":
            console.print(f"{file} (and .svg)", soft_wrap=True)
    return 0


_ALL = [(model, kind) for model in ("mixtral", "blackmamba") for kind in ("dense", "sparse")]


def _setting(r: Run) -> tuple[str, str] | None:
    """Which of the study's models and kinds a run is compared with: the one that scans or the one that attends; None: with neither, where
    it has another number of experts. A bare trace does not say how many: there its stages alone decide."""
    moe = None if r.profile is None else r.profile.moe
    if moe is not None and moe.experts != STUDY_EXPERTS:
        return None
    chosen = "moe/dispatch" in r.bars.kernels or "moe/topk" in r.bars.kernels
    dense = not chosen if moe is None else moe.top_k == moe.experts  # PyTorch chooses with k = E too
    return "blackmamba" if "mamba" in r.bars.layers else "mixtral", "dense" if dense else "sparse"


def _default_folder(path: Path) -> Path:
    return path / "breakdown" if path.is_dir() else path.parent / "breakdown"


def load(path: Path) -> Run:
    """A run by its trace if it has one (torch.profiler's: *.json.gz), else by its step_profile.json. Raises UserError where there is
    neither, or the trace's own."""
    name = path.name if path.is_dir() else path.name.split(".")[0]
    if path.name.endswith((".json.gz", ".pt.trace.json")):
        return Run(_bars(f"{name}\n(pytorch)", torch_trace.analyze(torch_trace.read(path))))
    described = path / schema.FILE_NAME if path.is_dir() else path
    if path.suffix == ".json" or (described.is_file() and not _has_trace(path)):
        return _from_profile(schema.read(path), name)
    b = analyze(xplane.read(xplane.find(path)))
    profile = schema.read(described) if path.is_dir() and described.is_file() else None
    peaks = roofline.believed(b, NO_PEAKS if profile is None else _peaks(profile.device))
    return Run(_bars(name, b), b, roofline.stages(b, peaks), peaks, profile)


def _bars(name: str, times: Times) -> Bars:
    phases = times.phases
    idle = phases.pop("idle")
    return Bars(name, phases, times.layers, times.moe_kernels, idle=idle)


def _peaks(device: schema.Device) -> Peaks:
    return Peaks(device.peak_flops, device.peak_bytes_per_second, "measured" if device.peaks_measured else "data sheet")


def _has_trace(path: Path) -> bool:
    return path.suffix in (".pb", ".gz") or any(path.glob("plugins/profile/*/*.xplane.pb"))


def _from_profile(profile: schema.StepProfile, name: str) -> Run:
    if profile.phases is None or profile.layers is None:
        raise UserError(
            f"the {schema.FILE_NAME} of {name} holds no phases and there is no trace: profile the run with `moejax profile CONFIG`"
        )
    phases = {k: v or 0.0 for k, v in profile.phases.model_dump().items() if v or k != COLLECTIVES}
    idle = phases.pop("idle")
    bars = Bars(f"{name}\n({profile.framework})", phases, profile.layers, profile.moe_kernels or {}, idle=idle)
    return Run(bars, peaks=_peaks(profile.device), profile=profile)


def as_dict(r: Run) -> dict[str, Any]:
    """For --json: everything that the tables show, unrounded."""
    b = r.breakdown
    return {
        "name": r.bars.name,
        "phases": dict(r.bars.phases),
        "idle": r.bars.idle,
        "layers": dict(r.bars.layers),
        "moe_kernels": dict(r.bars.kernels),
        "takeaways": takeaways(r.bars),
        "peaks": vars(r.peaks),
        "stages": [vars(s) for s in r.stages],
        "collectives": {kind: c.model_dump() for kind, c in r.collectives.items()},
        "imbalance": r.imbalance,
    } | ({} if b is None else {name: getattr(b, name) for name in _OF_A_TRACE})


_OF_A_TRACE = ("program", "platform", "steps", "step_seconds", "busy_seconds", "mixed_seconds", "attributed", "working")


def _print(r: Run, console: Console) -> None:
    b = r.breakdown
    title = r.bars.name.replace("\n", " ")
    if b is not None:
        title += f": {counted(b.steps, 'traced step')} of {b.program} on a {b.platform.upper()}"
        title += f", the mean of {len(b.working)}" if len(b.working) > 1 else ""
    console.print(title, style="bold", soft_wrap=True)
    console.print(_phases(r))
    if r.collectives:
        console.print(_collectives(r))
    for line in _unevenness(r):
        console.print(line, soft_wrap=True)
    if b is None:
        return
    console.print(_stages(r, whole=console.width >= WIDE))
    if r.peaks.measured and (over := [s.name for s in r.stages if s.bytes_per_second > (r.peaks.bytes_per_second or s.bytes_per_second)]):
        why = "read from caches, or the bandwidth was measured under load (profile again on a machine that does nothing else)"
        console.print(f"more than the measured bandwidth, shown as 100 %: {', '.join(over)}: {why}", soft_wrap=True)
    if console.width < WIDE:
        more = f"milliseconds by phase, GFLOP and MB: in a terminal of {WIDE} characters, or by --json"
        console.print(more, soft_wrap=True)
    console.print(
        f"{100 * b.attributed:.1f} % of the busy time is under a named stage. {100 * b.mixed_seconds / b.busy_seconds:.1f} % was split off "
        "fusions that mix stages or phases, by their instructions' own cost.",
        soft_wrap=True,
    )
    if b.attributed < 0.05:
        console.print(
            f"no scope of moejax's is in this trace: {b.program} is another program, or an older version's. Phases follow JAX's own marks.",
            soft_wrap=True,
        )
    if b.attributed < 0.95:
        console.print("longest under no name of ours:")
        for label, seconds in b.unnamed[:8]:
            console.print(f"  {1e3 * seconds:8.2f} ms  {label}", soft_wrap=True)


def _phases(r: Run) -> Table:
    table = figures("phase", "ms", "of step")
    parts = dict(r.bars.phases) | ({} if r.bars.idle is None else {"idle": r.bars.idle})
    whole = sum(parts.values())
    for name, seconds in parts.items():
        table.add_row(name, _ms(seconds), _percent(seconds / whole))
    table.add_section()
    table.add_row("step", _ms(whole), "")
    return table


def _collectives(r: Run) -> Table:
    """What goes between the devices: how often, how much each receives, and whether it does anything else meanwhile."""
    table = figures("collective", "a step", "MB", "ms", "exposed", "overlapped", "GB/s", title="between devices, each receives")
    for kind, c in r.collectives.items():
        exposed, overlapped = c.exposed_seconds or 0.0, c.overlapped_seconds or 0.0
        seconds, received = exposed + overlapped, c.bytes or 0.0
        rate = f"{received / seconds / 1e9:.2f}" if seconds else ""
        table.add_row(kind, f"{c.count:.0f}", f"{received / 1e6:.1f}", _ms(seconds), _ms(exposed), _ms(overlapped), rate)
    return table


def _unevenness(r: Run) -> list[str]:
    """Of several devices: how much more the busiest has to do."""
    told = []
    if r.breakdown is not None and len(working := r.breakdown.working) > 1:
        mean = sum(working.values()) / len(working)
        busiest = max(working, key=lambda device: working[device])
        told.append(f"work beside collectives: device {busiest} has {working[busiest] / mean:.2f} times the mean's ({_ms(mean)} ms)")
    if of_layers := r.imbalance:
        worst = max(of_layers, key=lambda layer: of_layers[layer])
        mean = sum(of_layers.values()) / len(of_layers)
        told.append(
            f"experts over devices: the busiest has {mean:.2f} times the mean's tokens in the mean layer, {of_layers[worst]:.2f} in layer "
            f"{worst}"
        )
    return told


def _stages(r: Run, whole: bool) -> Table:
    """By stage: time, and what was reached of the device's peaks. whole: with every column."""
    b = r.breakdown
    assert b is not None
    peaks = r.peaks
    known = peaks.flops_per_second is not None and peaks.bytes_per_second is not None
    said = (
        f"peaks ({peaks.source}): {peaks.flops_per_second / 1e9:.0f} GFLOP/s, {peaks.bytes_per_second / 1e9:.1f} GB/s"  # type: ignore[operator]
        if known
        else "the device's peaks are not known: a run's step_profile.json holds them"
    )
    phases = [p for p in ("forward", "recompute", "backward") if b.phases[p] and whole]
    columns = ["stage", "ms", "of busy", *phases, *(("GFLOP", "MB") if whole else ()), "GFLOP/s", "GB/s"]
    columns += ["of matrix\npeak", "of band-\nwidth"] if known else []
    table = figures(*columns, title=said)
    groups = ([s for s in r.stages if s.name.split("/")[0] == "moe"], [s for s in r.stages if s.name.split("/")[0] != "moe"])
    for group, label in zip(groups, ("all MoE", "the rest"), strict=True):
        for s in [*group, *([roofline.time_weighted(group, label)] if len(group) > 1 else [])]:
            parts = {g.name for g in group} if s.name == label else {s.name}
            cells = [s.name, _ms(s.seconds), _percent(s.seconds / b.busy_seconds)]
            cells += [_ms(sum(v for name, v in b.sums("stage", p).items() if name in parts)) for p in phases]
            cells += [f"{s.flops / 1e9:.2f}", f"{s.bytes / 1e6:.0f}"] if whole else []
            cells += [f"{s.flops_per_second / 1e9:.1f}", f"{s.bytes_per_second / 1e9:.2f}"]
            cells += [_percent(s.flops_share), _percent(s.bandwidth_share)] if known else []
            table.add_row(*cells, style="bold" if s.name == label else None)
        table.add_section()
    return table


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


# Of bars.takeaways, in its order: what fits next to a run's name in 80 characters.
_HEADINGS = ("MoE /\nlayers", "matmul\n/ MoE", "dequant\n/ MoE", "optim.\n/ step", "backw.+rec.\n/ forward", "recomp.\n/ step")


def _takeaways(bars: Sequence[Bars]) -> Table:
    table = figures("run", *_HEADINGS, title="takeaways, computed")
    for b in bars:
        values = takeaways(b).items()
        cells = ("" if v is None else f"{v:.2f}" if "/" in name else _percent(v) for name, v in values)
        table.add_row(b.name.replace("\n", " "), *cells)
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"
