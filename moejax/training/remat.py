"""`training.remat: auto`: the policy that recomputes least among those whose step fits into the device's memory, by the compiler.

Resolved once, before the model is made; everything behind it sees the policy's own name, and the run's config.yaml keeps it.
"""

from __future__ import annotations

from pathlib import Path

import jax

from moejax import device, gpus, processes
from moejax.config import Experiment, load
from moejax.estimator import run_receipt
from moejax.models.config import Architecture
from moejax.models.layers import REMAT_POLICIES
from moejax.models.ops import choice, host
from moejax.progress import say, waiting
from moejax.training import oracle
from moejax.tuner import remat as tuned

HOPELESS = 1.2
"""What the closed form puts at more than this share of the memory is not compiled."""


def of_run(experiment: Experiment) -> Experiment:
    """`auto` of `training.remat`, `training.accumulation` and `placement.experts` of a run that is resumed: what it chose when it began, so
    that it goes on with the same program."""
    config = Path(experiment.runs_dir) / experiment.name / "config.yaml"
    keys = [("training", "remat"), ("training", "accumulation"), ("placement", "experts")]
    choices = [(section, key) for section, key in keys if getattr(getattr(experiment, section), key) == "auto"]
    if not choices or not config.is_file():
        return experiment
    began = load(config)
    for section, key in choices:
        experiment = experiment.changed(section, **{key: getattr(getattr(began, section), key)})
    return experiment


def resolve(experiment: Experiment, config: Architecture, steps: int) -> Experiment:
    """The experiment with a policy in the place of `auto`; says which and why. The step that counts is that of the longest rows.

    steps: of the whole run. They stand in the program (the schedule): with them it is the one that the run will compile, and find.
    """
    if experiment.training.remat != "auto":
        return experiment
    limit = processes.least(device.usable_bytes())
    if limit is None:
        chosen, why = "full", "how much memory there is is not known here"
    else:
        chosen, told = choose(experiment.changed("training", steps=steps), config, limit)
        host = " of the host's available memory" if jax.local_devices()[0].platform == "cpu" else ""
        why = f"{', '.join(told)} of {limit / 1e9:.1f} GB{host}"
    say(f"training.remat: {chosen} ({why})")
    return experiment.changed("training", remat=chosen)


def choose(experiment: Experiment, config: Architecture, limit: int) -> tuple[str, list[str]]:
    """(policy, what each one tried takes) within `limit` bytes. The last one is taken unseen: if it does not fit either, the check of the
    compiled step says so. Figures that were compiled before, by the same versions for the same device, come from the cache on disk."""
    told: list[str] = []
    rows, row_tokens = experiment.data.batch_rows, experiment.data.longest_row
    here = device.this_machine(experiment.device.memory_fraction)
    most = within(experiment, limit)
    fastest = tuned.measured(experiment, config, choice.here())
    *others, last = tuned.not_slower(policies(), fastest)
    told += [] if fastest is None else [f"{fastest} was fastest when measured here"]
    for policy in others:
        asked = oracle.Oracle(experiment.changed("training", remat=policy), config, here, row_tokens, None)
        estimated = asked.breakdown(rows).total if policy == "none" else 0
        if estimated > HOPELESS * limit:
            told.append(f"{policy}: about {estimated / 1e9:.1f} by arithmetic")
            continue
        with waiting(f"compiling the step with training.remat = {policy}"):
            peak = asked.peak_bytes(rows)
        told.append(f"{policy}: {peak / 1e9:.1f}")
        if peak <= most:
            return policy, told
    return last, told


def within(experiment: Experiment, limit: int) -> float:
    """Bytes that a step which is not the last resort may take of `limit`; the rest is for what the compiler's peak leaves out."""
    return (1 - run_receipt.margin_here(experiment, gpus.gpu_name(device.name())).share) * limit


def policies() -> tuple[str, ...]:
    """Those that `auto` tries: `offload` too, where the host's pinned memory is another one than the device's."""
    here = jax.local_devices()[0]
    apart = here.platform != "cpu" and host.KIND in {memory.kind for memory in here.addressable_memories()}
    return REMAT_POLICIES if apart else REMAT_POLICIES[:-1]
