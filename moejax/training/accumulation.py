"""`training.accumulation`: whether the micro-batches of a step pass the model one after the other, or each layer together.

Together each matrix of the experts is dequantized once for all of them; the stream before each half of a layer is then kept of all.
`auto` is resolved once, as `training.remat` is, and kept by the run.
"""

from __future__ import annotations

from moejax import device, processes
from moejax.config import Experiment
from moejax.models.config import Architecture
from moejax.progress import say, waiting
from moejax.training import oracle
from moejax.training.program import NOTHING_OWN, Own
from moejax.training.remat import HOPELESS, within

PLAIN = "micro_batch_major"


def resolve(experiment: Experiment, config: Architecture, steps: int, own: Own = NOTHING_OWN) -> Experiment:
    """The experiment with an order in the place of `auto`; says which and why. steps: of the whole run, as `remat.resolve` has them."""
    t = experiment.training
    if t.accumulation == "layer_major" and t.gradient_accumulation == 1:
        say("training.accumulation: layer_major changes nothing with one micro-batch (training.gradient_accumulation = 1)")
    if t.accumulation != "auto":
        return experiment
    chosen, why = choose(experiment.changed("training", steps=steps), config, own)
    say(f"training.accumulation: {chosen} ({why})")
    return experiment.changed("training", accumulation=chosen)


def choose(experiment: Experiment, config: Architecture, own: Own) -> tuple[str, str]:
    """(order, why). layer_major where it saves dequantization and the step fits, with the policy that keeps least if remat is open too."""
    t = experiment.training
    if t.gradient_accumulation == 1:
        return PLAIN, "one micro-batch"
    if experiment.preference is not None or own.loss is not None:
        return PLAIN, "a loss of pairs" if own.loss is None else "a loss of your own"
    fetched = experiment.placement.fetches
    if config.experts_per_token == config.num_experts:
        return PLAIN, "experts are dense"
    if "experts" not in experiment.kinds(config) and not fetched:
        return PLAIN, "experts are not in 4 bits: nothing is dequantized"
    limit = processes.least(device.usable_bytes())
    if limit is None:
        return PLAIN, "how much memory there is is not known here"
    tried = experiment.changed("training", accumulation="layer_major", **({"remat": "full"} if t.remat == "auto" else {}))
    asked = oracle.Oracle(tried, config, device.this_machine(experiment.device.memory_fraction), experiment.data.longest_row, None)
    rows = experiment.data.batch_rows
    if t.remat != "dots" and (estimated := asked.breakdown(rows).total) > HOPELESS * limit:
        return PLAIN, f"layer_major: about {estimated / 1e9:.1f} of {limit / 1e9:.1f} GB by arithmetic"
    with waiting("compiling the step with training.accumulation = layer_major"):
        peak = asked.peak_bytes(rows)
    fits = peak <= within(experiment, limit)
    told = f"layer_major: {peak / 1e9:.1f} of {limit / 1e9:.1f} GB"
    if not fits:
        return PLAIN, told
    once = f"each expert's matrices are {'fetched' if fetched else 'dequantized'} once for {t.gradient_accumulation} micro-batches"
    return "layer_major", f"{once}; {told}"
