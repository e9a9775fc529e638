"""How many optimizer steps a run has, and after which of them it counts right answers."""

from __future__ import annotations

from itertools import accumulate, count, takewhile

from moejax.config import Experiment
from moejax.data.pipeline import Dataset
from moejax.errors import UserError


def steps_in(experiment: Experiment, dataset: Dataset, epoch: int) -> int:
    """Optimizer steps of an epoch."""
    return -(-dataset.train.batches_per_epoch(epoch) // experiment.training.gradient_accumulation)


def total_steps(experiment: Experiment, dataset: Dataset) -> int:
    """Optimizer steps of the whole run."""
    t = experiment.training
    return t.steps or sum(steps_in(experiment, dataset, epoch) for epoch in range(t.epochs or 1))


def scored_steps(experiment: Experiment, dataset: Dataset) -> frozenset[int]:
    """The steps after which `eval:` has answers counted: 0, what it says, and the last. None without such a section."""
    e, last = experiment.eval, total_steps(experiment, dataset)
    if e is None:
        return frozenset()
    steps = {0, last, *range(0, last, e.every_steps or last)}
    if e.each_epoch:
        ends = accumulate(steps_in(experiment, dataset, epoch) for epoch in count())
        steps |= set(takewhile(lambda end: end < last, ends))
    return frozenset(steps)


def check_profile(experiment: Experiment, dataset: Dataset) -> None:
    """Raises UserError where the traced steps do not come, or an evaluation would come between them and be counted as their time."""
    p, every = experiment.profile, experiment.training.eval_every
    if p is None:
        return
    try:
        p.check(total_steps(experiment, dataset))
    except ValueError as error:
        raise UserError(str(error)) from None
    scored = scored_steps(experiment, dataset)
    for step in range(p.start_step, p.last_step):
        if step in scored or (every and dataset.evaluation is not None and step % every == 0):
            raise UserError(
                f"profile traces steps {p.start_step} to {p.last_step}, and an evaluation comes after step {step}: its time would be "
                f"counted as theirs. Trace others, e.g. profile.start_step={step + 1}, or fewer (profile.steps)"
            )
