"""`placement.experts: auto`: on the device, if the compiled step fits there. Resolved once, as `training.remat: auto` is."""

from __future__ import annotations

import jax

from moejax import device
from moejax.config import Experiment
from moejax.models.config import Architecture
from moejax.progress import say, waiting
from moejax.training import oracle
from moejax.training.remat import RESERVE


def resolve(experiment: Experiment, config: Architecture, steps: int) -> Experiment:
    """The experiment with a place for the experts instead of `auto`: the device, where the step fits there with the rematerialization that
    keeps least; says which and why. steps: as of `remat.resolve`."""
    if experiment.placement.experts != "auto":
        return experiment
    limit = device.usable_bytes()
    if limit is None or jax.local_devices()[0].platform == "cpu":
        chosen, why = "device", "a CPU has one memory" if limit else "how much memory there is is not known here"
    else:
        least = "full" if experiment.training.remat == "auto" else experiment.training.remat
        tried = experiment.changed("placement", experts="device").changed("training", steps=steps, remat=least)
        here = device.this_machine(experiment.device.memory_fraction)
        with waiting("compiling the step with placement.experts = device"):
            rows, row_tokens = experiment.data.batch_rows, experiment.data.longest_row
            peak = oracle.Oracle(tried, config, here, row_tokens, None).peak_bytes(rows)
        chosen = "device" if peak <= (1 - RESERVE) * limit else "host"
        why = f"on the device: {peak / 1e9:.1f} of {limit / 1e9:.1f} GB"
    say(f"placement.experts: {chosen} ({why})")
    return experiment.changed("placement", experts=chosen)
