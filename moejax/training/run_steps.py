"""The optimizer steps of a run: how many, what goes into each, and after which of them right answers are counted."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, count, takewhile
from typing import NamedTuple

from moejax.config import Experiment
from moejax.data.batch import Batch, PairBatch
from moejax.data.batching import Batches, stack
from moejax.data.pipeline import Dataset
from moejax.errors import UserError
from moejax.estimator.units import counted
from moejax.training.checkpoint import Position

FEW_STEPS = 20


class Work(NamedTuple):
    """One optimizer step's input: micro-batches [A, rows, T], and where the data stands after it."""

    batch: Batch | PairBatch
    after: Position


def steps_in(experiment: Experiment, dataset: Dataset, epoch: int) -> int:
    """Optimizer steps of an epoch."""
    return -(-dataset.train.batches_per_epoch(epoch) // experiment.training.gradient_accumulation)


def total_steps(experiment: Experiment, dataset: Dataset) -> int:
    """Optimizer steps of the whole run."""
    t = experiment.training
    return t.steps or sum(steps_in(experiment, dataset, epoch) for epoch in range(t.epochs or 1))


def longest_row(experiment: Experiment, dataset: Dataset) -> int:
    """Tokens of the longest row that the run will train on."""
    if isinstance(dataset.train, Batches) and any(weight < 1 for _, weight in dataset.train.weights):  # an epoch has not all of them
        return dataset.train.longest_row()
    steps = min(total_steps(experiment, dataset), steps_in(experiment, dataset, 0))  # the longest row comes in every epoch
    return max(dataset.train.row_tokens(0)[: steps * experiment.training.gradient_accumulation])


def works(experiment: Experiment, dataset: Dataset, position: Position, step: int) -> Iterator[Work]:
    """Optimizer steps from `position`, where `step` of them are done, to the last."""
    epoch, skip, last = position.epoch, position.step_in_epoch, total_steps(experiment, dataset)
    accumulation = experiment.training.gradient_accumulation
    while step < last:
        steps = steps_in(experiment, dataset, epoch)
        batches = dataset.train.iterate(epoch, start=skip * accumulation)
        for index in range(skip, steps):
            if step == last:
                return
            micro = [b for _, b in zip(range(accumulation), batches, strict=False)]
            step += 1
            after = Position(epoch + 1, 0) if index + 1 == steps else Position(epoch, index + 1)
            yield Work(stack(micro, accumulation), after)
        epoch, skip = epoch + 1, 0


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


def check_steps(experiment: Experiment, dataset: Dataset) -> list[str]:
    """What can be judged only now that the number of steps is known. Lines of what comes never, or is mostly padding, to be reported.

    Raises UserError where the warm-up takes the whole run.
    """
    t, d, total = experiment.training, experiment.data, total_steps(experiment, dataset)
    each = [steps_in(experiment, dataset, epoch) for epoch in range(t.epochs or 1)] if t.steps is None else []
    if t.warmup_steps >= total:
        made = f" ({counted(len(each), 'epoch')} of {counted(each[0], 'step')})" if each else ""
        raise UserError(
            f"training: warmup_steps = {t.warmup_steps} leaves nothing of steps = {total}{made}: lower training.warmup_steps, or train "
            "longer"
        )
    told = []
    if each and total < FEW_STEPS:
        told.append(
            f"{counted(total, 'step')} in all ({counted(len(each), 'epoch')} of {counted(each[0], 'step')}) are few to learn from: raise "
            "training.epochs, lower data.batch_rows or training.gradient_accumulation, or bring more data"
        )
    if t.eval_every and dataset.evaluation is None:
        told.append(f"training.eval_every = {t.eval_every}: nothing is held out to evaluate on (data.holdout, data.eval_source)")
    every = {"training.eval_every": t.eval_every, "checkpoint.every": experiment.checkpoint.every}
    if experiment.eval is not None:
        every["eval.every_steps"] = experiment.eval.every_steps
    only = f"the run has {counted(total, 'step')}, only its last counts"
    told += [f"{key} = {n}: {only}" for key, n in every.items() if n is not None and n > total]
    batches, rows = dataset.train.batches_per_epoch(0), dataset.train.rows()
    if t.gradient_accumulation > batches:
        told.append(
            f"training.gradient_accumulation = {t.gradient_accumulation}: of the micro-batches of a step {batches} hold data, all of an "
            "epoch's; the others are padding"
        )
    if d.batch_rows > rows:
        told.append(f"data.batch_rows = {d.batch_rows}: an epoch has {counted(rows, 'row')}, the rest of each batch is padding")
    return [f"note: {line}" for line in told]


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
