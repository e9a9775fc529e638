"""After a run that traced some of its steps: `step_profile.json` and a short table of where a step's time went."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

from moejax import __version__
from moejax import device as machine
from moejax.config import Experiment
from moejax.errors import UserError
from moejax.estimator.sizes import stored
from moejax.estimator.units import counted
from moejax.profiling import breakdown, roofline, schema, xplane
from moejax.profiling import traced as of_steps
from moejax.profiling.capture import Capture, plugin_hint
from moejax.profiling.label import label
from moejax.progress import say
from moejax.training import experts
from moejax.training.program import Compiled, TrainProgram

MEASURED_AGAIN = 3  # times, where a stage of the step was faster than a measured peak


def report(
    experiment: Experiment, program: TrainProgram, capture: Capture, traced: list[dict[str, Any]], step_seconds: list[float], peak: float
) -> None:
    """Analyze the trace, write RUN/step_profile.json, say where they are. A run is never lost to a trace that says nothing.

    traced: the records of the traced steps, with their batches' shapes; step_seconds: of steps that nothing disturbed; peak: FLOP/s, as
    measured at the start.
    """
    folder = capture.folder
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
    profile = assemble(experiment, program, traced, step_seconds, peak, found)
    schema.write(profile, folder / schema.FILE_NAME)
    untraced = profile.step_seconds
    if untraced.median is not None:
        say("", f"a step: {1e3 * untraced.median:.2f} ms, the median of {untraced.n} untraced")
    say(f"{path}\n{folder / schema.FILE_NAME}\nby phase, layer and kernel, with figures: moejax breakdown {folder}")
    if hint := plugin_hint():
        say(hint)


def assemble(
    experiment: Experiment, program: TrainProgram, traced: list[dict[str, Any]], seconds: list[float], peak: float,
    found: breakdown.Breakdown,
) -> schema.StepProfile:  # fmt: skip
    """The contract's fields, from the run and from its trace."""
    config = program.config
    total, active = config.parameters
    _, rows, row_tokens = traced[-1]["shape"]
    plan = experts.plan(experiment, config, rows * row_tokens)
    return schema.StepProfile(
        schema_version=2,
        framework="jax",
        versions={"moejax": __version__, "python": platform.python_version()} | {n: version(n) for n in ("jax", "jaxlib", "flax")},
        device=_device(peak, experiment.training.compute_dtype, roofline.fastest(found)[1]),
        model=schema.ModelCounts(
            name=experiment.model.source or str(experiment.model.preset), params_total=total, params_active=active,
            params_trainable=sum(w.size for w in stored(experiment, config) if w.trained),
        ),
        method=experiment.method,
        precision=experiment.training.compute_dtype,
        remat=experiment.training.remat,
        moe=schema.Moe(experts=config.num_experts, top_k=config.experts_per_token, backend="dense" if plan is None else plan.backend),
        batch=schema.Batch(**of_steps.batch(experiment.data.batching, traced)),
        step_seconds=schema.StepSeconds(**of_steps.step_seconds(seconds)),
        compile_seconds=program.compile_seconds,
        memory=_memory([program.compile(*record["shape"][1:]) for record in traced]),
        phases=schema.Phases(**{"collectives": 0.0} | found.phases),
        layers=dict(found.layers),
        moe_kernels=dict(found.moe_kernels),
        cost={scope: schema.Cost(flops=cost.flops, bytes=cost.bytes) for scope, cost in found.cost.items()},
        expert_load=of_steps.expert_load(traced, config.expert_layer_numbers),
        devices=len(found.working),
        mode=None if experiment.mesh is None else experiment.mesh.weights,
        collectives=found.profiled_collectives,
    )  # fmt: skip


def _device(peak_at_start: float, dtype: str, reached: float) -> schema.Device:
    """A peak that is measured is the best of two measurements: another process may have disturbed one. It is measured again while it lies
    below what a stage of the step `reached`, FLOP/s."""
    peak, source = machine.peak_flops(dtype)
    peak = max(peak, peak_at_start)
    for _ in range(MEASURED_AGAIN if source == "measured" else 0):
        if peak >= reached:
            break
        peak = max(peak, machine.peak_flops(dtype)[0])
    bandwidth = max(machine.peak_bytes_per_second()[0] for _ in range(2))
    return schema.Device(
        name=machine.name(), memory_bytes=machine.size_bytes(), peak_flops=peak, peak_bytes_per_second=bandwidth,
        peaks_measured=source == "measured",
    )  # fmt: skip


def _memory(compiled: list[Compiled]) -> schema.Memory:
    """Of the traced program (of several batch shapes: the largest)."""
    largest = max(compiled, key=lambda c: c.peak_bytes)
    return schema.Memory(
        compiler_peak_bytes=largest.peak_bytes,
        measured_peak_bytes=next(iter(machine.memory_bytes().values())),
        arguments_bytes=largest.argument_bytes,
        temporaries_bytes=largest.temporary_bytes,
    )
