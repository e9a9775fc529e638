"""What a run will take, said at its start and held against what it took at its end (`estimate.py compare` says it again).

Memory is the compiled step's. Time needs coefficients of this model and device: `estimate.py fit RUN… --out RUNS_DIR/coefficients.json`.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from moejax import device, gpus
from moejax.config import Experiment
from moejax.errors import UserError
from moejax.estimator import coefficients, comparison, fitting, prices, run_receipt, units
from moejax.models.config import Architecture
from moejax.models.ops.choice import here
from moejax.progress import say
from moejax.training import experts

COEFFICIENTS = "coefficients.json"


def announce(
    experiment: Experiment, config: Architecture, folder: Path, *, peak_bytes: int, tokens: int, step: int, last: int, first: bool
) -> None:
    """Keep the prediction in the run's prediction.json when a program was compiled, and tell it for this process's `first`; a batch of
    another shape that is compiled later only raises the peak. tokens: of this step, padding included; last: step of the run."""
    path = folder / comparison.PREDICTION
    disturbed = _disturbed(experiment, folder, step)
    if not first:
        document = comparison.read_prediction(folder)
        document["compiler_peak_bytes"] = max(peak_bytes, document["compiler_peak_bytes"])
        comparison.write_json(path, document | {"disturbed_steps": disturbed})
        return
    steps = last - step + 1
    model = fitting.model_name(experiment.model.source or str(experiment.model.preset))
    share = config.experts_per_token / config.num_experts
    gpu = gpus.gpu_name(device.name())
    time, why = _time(Path(experiment.runs_dir) / COEFFICIENTS, model, experiment.method, gpu, share)
    if experiment.preference is not None:
        time, why = None, "coefficients are of supervised training, and a step of preferences has a forward pass more"
    price = prices.cheapest(prices.load("2026", gpus.GPUS), gpu) if gpu in gpus.GPUS else None
    document = {
        "compiler_peak_bytes": peak_bytes, "gpu": gpu, "model": model, "method": experiment.method, "share": share, "time": time,
        "why_no_time": why, "disturbed_steps": disturbed,
        "recipe": run_receipt.recipe(experiment, config, engagement(experiment, config, tokens)),
        "program": None if experiment.preference else run_receipt.program(experiment, config, gpu, tokens, run_receipt.before(experiment)),
    }  # fmt: skip
    comparison.write_json(path, document)
    told = f"prediction: {units.told(peak_bytes)} by the compiled step"
    program = document["program"]
    if time is None and program is not None:
        low, high = program["interval"]
        told += f"; {program['predicted']:.2f} s a step ({low:.2f} to {high:.2f}): {program['basis']}"
    elif time is None:
        told += f"; no time: {why}"
    else:
        law = comparison.step_time(time)
        seconds, ends = law.seconds(tokens, share), law.interval(tokens, share)
        between = "" if ends is None else f" ({1e3 * ends[0]:.1f} to {1e3 * ends[1]:.1f})"
        told += f"; {1e3 * seconds:.1f} ms a step of {tokens:,} tokens{between}"
        told += f", {seconds * steps / 60:.1f} min for {units.counted(steps, 'step')}"
        told += "".join(f"; {note}" for note in law.beyond(tokens, share, 0))
        told += "" if law.doubt is None else f"; do not trust it: its coefficients are in doubt ({law.doubt})"
        if price is not None:
            told += f", {seconds * steps / 3600 * price.usd_per_hour:.2f} USD at {price.told}"
    say(told)


def _disturbed(experiment: Experiment, folder: Path, step: int) -> list[int]:
    """Steps whose seconds are not a step's: one that warmed up after compiling, the one before it (it was running meanwhile), and the
    traced ones with the next, in which the trace is written. What an earlier process of a resumed run told stays."""
    known: list[int] = []
    if step > 1:
        with suppress(UserError):  # a run is not lost to a prediction that another version wrote
            known = comparison.read_prediction(folder)["disturbed_steps"]
    traced = () if experiment.profile is None else range(experiment.profile.start_step, experiment.profile.last_step + 2)
    return sorted({*known, *traced, step, step - 1} - {0})


def engagement(experiment: Experiment, config: Architecture, tokens: int) -> dict[str, Any]:
    """Which kernels a step runs, as far as it is known at its start."""
    chosen = experts.plan(experiment, config, tokens // experiment.training.gradient_accumulation)
    attention, scan = (" ".join(told(experiment, config, here())) for told in (experts.announce_attention, experts.announce_scan))
    return {
        "experts": "dense" if chosen is None else chosen.backend, "tile": None if chosen is None else chosen.tile,
        "attention": attention.removeprefix("attention: ") or None, "scan": scan.removeprefix("selective scan: ") or None,
        "remat": experiment.training.remat,
        "accumulation": experiment.training.accumulation,
    }  # fmt: skip


def conclude(folder: Path) -> list[str]:
    """Predicted against measured, as far as it was predicted, in lines; comparison.json keeps it. A run is never lost to it."""
    try:
        document = comparison.compare(folder)
        run_receipt.write(folder, document)
        return comparison.lines(document, compared=True)
    except (UserError, OSError) as error:
        with suppress(UserError, OSError):
            if comparison.read_prediction(folder)["time"] is None and "device_peak_bytes" not in device.memory_bytes():
                return []  # nothing was predicted: a CPU's memory is not compared
        return [f"no comparison: {error}"]


def _time(file: Path, model: str, method: str, gpu: str, share: float) -> tuple[dict[str, Any] | None, str | None]:
    """The entry of this model, method and device in the file, as prediction.json keeps it; or why there is none."""
    how = f"profile runs (moejax profile CONFIG), then moejax estimate fit RUN… --out {file}"
    if not file.is_file():
        return None, f"{file} is not there: {how}"
    try:
        entries = coefficients.read(file)
        for entry in entries:
            if (entry.model, entry.method, entry.gpu) == (model, method, gpu):
                return comparison.time_prediction(entry, share), None
    except UserError as error:
        return None, str(error)
    return None, f"{file} has none of {model} by {method} on {gpu}: {how}"
