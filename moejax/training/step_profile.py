"""After a run that traced some of its steps: `step_profile.json` and a short table of where a step's time went."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import jax
import numpy as np
from rich.table import Table

from moejax import __version__
from moejax import device as machine
from moejax.config import Experiment
from moejax.errors import UserError
from moejax.estimator.units import counted
from moejax.models.build import Model
from moejax.profiling import breakdown, roofline, schema, xplane
from moejax.profiling.capture import Capture, plugin_hint
from moejax.profiling.label import label
from moejax.terminal import Console
from moejax.training import experts, memory
from moejax.training.parameters import groups_of

MEASURED_AGAIN = 3  # times, where a stage of the step was faster than a measured peak


@dataclass(frozen=True)
class Measured:
    """What the loop knows of a run. step_seconds: of steps that nothing disturbed; programs: the compiled steps that were traced."""

    experiment: Experiment
    model: Model
    folder: Path
    capture: Capture
    traced: list[dict[str, Any]]
    step_seconds: list[float]
    programs: list[Any]
    compile_seconds: float
    peak_flops: float


def report(measured: Measured, console: Console) -> None:
    """Analyze the trace, write RUN/step_profile.json, print the phases. A run is never lost to a trace that says nothing."""
    capture, folder = measured.capture, measured.folder

    def say(text: str) -> None:
        console.print(text, soft_wrap=True)

    if capture.missed:
        say(
            f"profile: nothing was traced: steps {capture.first} to {capture.last} were past when this process began, or its first "
            "step, which compiles"
        )
        return
    if not capture.complete:
        say(f"profile: stopped after {capture.done} of {counted(capture.last - capture.first + 1, 'traced step')}: no {schema.FILE_NAME}")
        return
    try:
        path = xplane.find(folder)
        trace = xplane.read(path)
        found = breakdown.analyze(trace)
    except UserError as error:
        say(f"profile: the trace was written, but not understood: {error}")
        return
    label(path, trace, found.program)
    profile = assemble(measured, found)
    schema.write(profile, folder / schema.FILE_NAME)
    say("")
    console.print(phase_table(profile, capture))
    say(f"{path}\n{folder / schema.FILE_NAME}\nby layer and kernel, with figures: moejax breakdown {folder}")
    if hint := plugin_hint():
        say(hint)


def phase_table(profile: schema.StepProfile, capture: Capture) -> Table:
    """Milliseconds and shares of the phases of a traced step."""
    phases = {} if profile.phases is None else profile.phases.model_dump()
    total = sum(phases.values()) or 1.0
    table = Table(title=f"a step's time, mean of steps {capture.first} to {capture.last}", title_justify="left")
    for column in ("phase", "ms", "share"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for name, seconds in phases.items():
        table.add_row(name, f"{1e3 * seconds:.2f}", f"{100 * seconds / total:.1f} %")
    table.add_section()
    table.add_row("traced step", f"{1e3 * total:.2f}", "")
    untraced = profile.step_seconds
    if untraced.median is not None:
        table.add_row(f"median of {untraced.n} untraced", f"{1e3 * untraced.median:.2f}", "")
    return table


def assemble(measured: Measured, found: breakdown.Breakdown) -> schema.StepProfile:
    """The contract's fields, from the run and from its trace."""
    experiment, config = measured.experiment, measured.model.config
    groups, (total, active) = groups_of(measured.model), config.parameters
    _, rows, row_tokens = measured.traced[-1]["shape"]
    backend = experts.backend(experiment, config, rows * row_tokens)
    quantized = experiment.quantization.format != "none"
    return schema.StepProfile(
        schema_version=1,
        framework="jax",
        versions={"moejax": __version__, "python": platform.python_version()}
        | {n: version(n) for n in ("jax", "jaxlib", "flax")},
        device=_device(measured.peak_flops, experiment.training.compute_dtype, roofline.fastest(found)[1]),
        model=schema.ModelCounts(
            name=experiment.model.source or str(experiment.model.preset),
            params_total=total,
            params_active=active,
            params_trainable=sum(g.parameters for g in groups.values() if g.trainable),
        ),
        method="full" if experiment.adapter is None else "qlora" if quantized else "lora",
        precision=experiment.training.compute_dtype,
        remat=experiment.training.remat,
        moe=schema.Moe(experts=config.num_experts, top_k=config.experts_per_token, backend=backend),
        batch=_batch(experiment.data.batching, measured.traced),
        step_seconds=_step_seconds(measured.step_seconds),
        compile_seconds=measured.compile_seconds,
        memory=_memory(measured.programs),
        phases=schema.Phases(**found.phases),
        layers=dict(found.layers),
        moe_kernels=dict(found.moe_kernels),
        cost={scope: schema.Cost(flops=cost.flops, bytes=cost.bytes) for scope, cost in found.cost.items()},
        expert_load=_expert_load(measured.traced),
    )


def _device(peak_at_start: float, dtype: str, reached: float) -> schema.Device:
    """A peak that is measured is the best of two measurements: another process may have disturbed one. It is measured again while it lies
    below what a stage of the step `reached`, FLOP/s."""
    device = jax.local_devices()[0]
    peak, source = machine.peak_flops(dtype)
    peak = max(peak, peak_at_start)
    for _ in range(MEASURED_AGAIN if source == "measured" else 0):
        if peak >= reached:
            break
        peak = max(peak, machine.peak_flops(dtype)[0])
    bandwidth = max(machine.peak_bytes_per_second()[0] for _ in range(2))
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:  # what this process may use: a known fraction of the whole
        size = round(stats["bytes_limit"] / float(os.environ.get("XLA_CLIENT_MEM_FRACTION", "0.75")))
    else:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return schema.Device(
        name=device.device_kind if device.platform != "cpu" else machine.cpu_name(),
        memory_bytes=size,
        peak_flops=peak,
        peak_bytes_per_second=bandwidth,
        peaks_measured=source == "measured",
    )


def _batch(batching: Any, traced: list[dict[str, Any]]) -> schema.Batch:
    def mean(name: str) -> float:
        return fmean(record[name] for record in traced)

    shapes = [record["shape"] for record in traced]  # [A, rows, T]
    return schema.Batch(
        batching=batching,
        rows=fmean(a * rows for a, rows, _ in shapes),
        row_tokens=fmean(tokens for _, _, tokens in shapes),
        queries=mean("queries"),
        tokens=mean("padded_tokens"),
        real_tokens=mean("real_tokens"),
        supervised_tokens=mean("supervised_tokens"),
    )


def _step_seconds(seconds: list[float]) -> schema.StepSeconds:
    if not seconds:
        return schema.StepSeconds(median=None, p10=None, p90=None, n=0)
    p10, median, p90 = (float(p) for p in np.percentile(seconds, (10, 50, 90)))
    return schema.StepSeconds(median=median, p10=p10, p90=p90, n=len(seconds))


def _memory(programs: list[Any]) -> schema.Memory:
    """Of the traced program (of several batch shapes: the largest)."""
    largest = max(programs, key=memory.compiler_peak_bytes)
    analysis = largest.memory_analysis()
    return schema.Memory(
        compiler_peak_bytes=memory.compiler_peak_bytes(largest),
        measured_peak_bytes=next(iter(machine.memory_bytes().values())),
        arguments_bytes=analysis.argument_size_in_bytes,
        temporaries_bytes=analysis.temp_size_in_bytes,
    )


def _expert_load(traced: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Layer -> tokens per expert, mean over the traced steps."""
    counts = np.mean([record["expert_counts"] for record in traced], axis=0)
    return {str(layer): [float(c) for c in row] for layer, row in enumerate(counts)}
