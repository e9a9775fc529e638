"""`placement.experts: auto`: on the device in as many layers as fit by the compiled step. Resolved once, as `training.remat: auto` is."""

from __future__ import annotations

import jax

from moejax import device, processes
from moejax.config import Experiment
from moejax.estimator import placing
from moejax.models.config import Architecture
from moejax.progress import say, waiting
from moejax.training import oracle
from moejax.training.remat import within


def resolve(experiment: Experiment, config: Architecture, steps: int) -> Experiment:
    """The experiment with a place for the experts instead of `auto`: the device where the step fits there with the rematerialization that
    keeps least, else the most layers with which it does, else the host; says which and why. steps: as of `remat.resolve`."""
    if experiment.placement.experts != "auto":
        return experiment
    limit = processes.least(device.usable_bytes())
    if limit is None or jax.local_devices()[0].platform == "cpu":
        chosen: str | int = "device"
        why = "a CPU has one memory" if limit else "how much memory there is is not known here"
    else:
        chosen, why = _choose(experiment.changed("training", steps=steps), config, limit)
    say(f"placement.experts: {chosen} ({why})")
    return experiment.changed("placement", experts=chosen)


def _choose(experiment: Experiment, config: Architecture, limit: int) -> tuple[str | int, str]:
    least = "full" if experiment.training.remat == "auto" else experiment.training.remat
    experiment = experiment.changed("training", remat=least)
    here, layers = device.this_machine(experiment.device.memory_fraction), config.expert_layers
    rows, row_tokens, tried = experiment.data.batch_rows, experiment.data.longest_row, {}

    def peak_bytes(on_device: int) -> int:
        place = "device" if on_device == layers else on_device
        asked = oracle.Oracle(experiment.changed("placement", experts=place), config, here, row_tokens, None)
        with waiting(f"compiling the step with placement.experts = {place}"):
            tried[place] = asked.peak_bytes(rows)
        return tried[place]

    found = placing.most_layers(peak_bytes, layers, placing.expert_bytes(experiment, config) / layers, within(experiment, limit))
    chosen = {0: "host", layers: "device"}.get(found, found)
    return chosen, f"{', '.join(f'{place}: {peak / 1e9:.1f}' for place, peak in tried.items())} of {limit / 1e9:.1f} GB"


def announce(experiment: Experiment, config: Architecture) -> list[str]:
    """One line for the start of a run, where experts come from the host's memory."""
    on_a_cpu = jax.local_devices()[0].platform == "cpu"  # which has one memory, and no bus
    line = placing.told(experiment, config, None if on_a_cpu else device.this_machine(experiment.device.memory_fraction))
    return [] if line is None else [line]
