"""Checkpoints by orbax: trainable weights, optimizer, step and data position; never the frozen base."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from moejax.errors import UserError, first_line
from moejax.training.step import TrainState


@dataclass(frozen=True)
class Position:
    """Where the next optimizer step takes its data: optimizer steps done in this epoch."""

    epoch: int
    step_in_epoch: int


class Checkpoints:
    """Asynchronous checkpoints of a run: the last `keep`, and the best by evaluation loss if `best`."""

    def __init__(self, folder: Path, keep: int, best: bool):
        policies: list[Any] = [LatestN(keep)]
        if best:
            policies.append(
                BestN(get_metric_fn=lambda m: m["eval_loss"], reverse=True, n=1, keep_checkpoints_without_metrics=False)
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies), enable_async_checkpointing=True
        )
        self.manager = ocp.CheckpointManager(
            folder.absolute(),
            options=options,
            item_names=("state", "position"),
        )

    def save(self, step: int, state: TrainState, position: Position, eval_loss: float | None) -> None:
        """Start saving; returns when the state is copied, before it is on disk. Raises UserError where the last could not be written."""
        if step in self.manager.all_steps():
            return
        with self._writing():
            self.manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(_named(state)), position=ocp.args.JsonSave(asdict(position))),
                metrics=None if eval_loss is None else {"eval_loss": eval_loss},
            )

    def latest_step(self) -> int | None:
        return self.manager.latest_step()

    def best_step(self) -> int | None:
        return self.manager.best_step()

    def restore(self, state: TrainState, step: int | None = None) -> tuple[TrainState, Position]:
        """The saved state in the shapes, dtypes and places of `state`. Raises UserError where there is none, or it does not fit."""
        step = self.latest_step() if step is None else step
        if step is None:
            raise UserError(f"{self.manager.directory} holds no checkpoint: start the run without --resume")
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), _named(state))
        try:
            restored = self.manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), position=ocp.args.JsonRestore())
            )
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise UserError(
                f"checkpoint {step} in {self.manager.directory} cannot be read into this run: {str(error).splitlines()[0]}"
            ) from error
        leaves = [restored.state[name] for name in _named(state)]
        return jax.tree.unflatten(jax.tree.structure(state), leaves), Position(**restored.position)

    def wait(self) -> None:
        """Until everything is on disk. Raises UserError where it cannot be."""
        with self._writing():
            self.manager.wait_until_finished()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self.manager.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What orbax raises where a file cannot be written (it writes aside and renames: what was saved before stays whole)."""
        try:
            yield
        except (ValueError, OSError) as error:
            full = "RESOURCE_EXHAUSTED" in str(error) or getattr(error, "errno", None) == errno.ENOSPC
            why = "the disk is full" if full else first_line(error)
            step = self.latest_step()
            kept = "no checkpoint is there" if step is None else f"checkpoint {step} is whole: --resume goes on from it"
            raise UserError(
                f"{self.manager.directory}: a checkpoint cannot be written: {why}. Make room, or set runs_dir to another disk; {kept}"
            ) from error


def _named(state: TrainState) -> dict[str, jax.Array]:
    """A flat dict by path: what lies on disk does not depend on the classes of optimizer states or variables."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
