"""Checkpoints by orbax: trainable weights, optimizer, step and data position; never the frozen base.

Each holds checksums of what is in it, taken on the device before it is written and compared with what is restored: what a disk, or
anyone who copied it, has changed does not train. A checkpoint that is not whole is set aside, and the one before it is taken.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from moejax import device, processes
from moejax.errors import UserError, first_line
from moejax.progress import say
from moejax.training.step import TrainState


@dataclass(frozen=True)
class Position:
    """Where the next optimizer step takes its data: optimizer steps done in this epoch."""

    epoch: int
    step_in_epoch: int


class OtherState(UserError):
    """A whole checkpoint of a run that holds other arrays: its settings were changed."""


class Checkpoints:
    """Asynchronous checkpoints of a run: the last `keep`, and the best by evaluation loss if `best`."""

    def __init__(self, folder: Path, keep: int, best: bool):
        _tell_once()
        policies: list[Any] = [LatestN(keep)]
        if best:
            policies.append(BestN(get_metric_fn=lambda m: m["eval_loss"], reverse=True, n=1, keep_checkpoints_without_metrics=False))
        options = ocp.CheckpointManagerOptions(preservation_policy=AnyPreservationPolicy(policies), enable_async_checkpointing=True)
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options, item_names=("state", "position"))
        self._unfinished = False

    def save(self, step: int, state: TrainState, position: Position, eval_loss: float | None) -> None:
        """Start saving; returns when the state is copied, before it is on disk. Raises UserError where the last could not be written."""
        if step in self.manager.all_steps():
            return
        named = _named(state)
        content = {"position": asdict(position), "checksums": checksums(named)}
        with self._writing():
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(named), position=ocp.args.JsonSave(content | {"sha256": _digest(content)})
                ),
                metrics=None if eval_loss is None else {"eval_loss": eval_loss},
            )
        self._unfinished = True

    def tidy(self) -> None:
        """Call now and then: what a save took is returned once it is on disk. Else resident memory grows for thousands of steps."""
        if self._unfinished and not self.manager.is_saving_in_progress():
            self._unfinished = False
            device.return_freed()

    def latest_step(self) -> int | None:
        return self.manager.latest_step()

    def best_step(self) -> int | None:
        return self.manager.best_step()

    def newest(self, state: TrainState) -> tuple[TrainState, Position]:
        """The newest checkpoint that is whole, as `restore` gives it. Newer ones are moved to RUN/damaged, and that is reported.

        Raises UserError, with what is wrong with the newest, where none is whole.
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        refused: dict[int, str] = {}
        for step in steps:
            try:
                found = self.restore(state, step)
            except OtherState:
                raise
            except UserError as error:
                refused[step] = str(error)
                continue
            self._set_aside(refused, step)
            return found
        reason = refused[steps[0]] if steps else f"{self.manager.directory} holds no checkpoint"
        older = f". None of the older ones ({', '.join(map(str, steps[1:]))}) is whole either" if len(steps) > 1 else ""
        raise UserError(f"{reason}{older}. Put a whole copy there, or start a new run under another name=…")

    def _set_aside(self, refused: dict[int, str], taken: int) -> None:
        folder = Path(self.manager.directory)
        for step, reason in refused.items() if processes.is_first() else ():
            to = folder.parent / "damaged" / f"checkpoint-{step}"
            while to.exists():
                to = to.with_name(f"{to.name}-again")
            to.parent.mkdir(exist_ok=True)
            (folder / str(step)).rename(to)
            say(f"warning: {reason}. It was moved to {to}; the run continues from step {taken}")
        if refused:
            processes.wait_for_all("damaged checkpoints are set aside")
            self.manager.reload()

    def restore(self, state: TrainState, step: int) -> tuple[TrainState, Position]:
        """The saved state in the shapes, dtypes and places of `state`. Raises UserError where it does not fit, or is not what was saved."""
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), _named(state))
        what = f"checkpoint {step} in {self.manager.directory}"
        try:
            restored = self.manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), position=ocp.args.JsonRestore())
            )
            leaves = {name: restored.state[name] for name in abstract}
            content = dict(restored.position)
            if "sha256" not in content:  # of a version that kept no checksums
                return _unnamed(state, leaves), Position(**content)
            if content.pop("sha256") != _digest(content):
                raise UserError(f"{what} is damaged: its data position is not what was written")
            found = checksums(leaves)
            changed = [name for name in leaves if found[name] != content["checksums"][name]]
            if changed:
                raise UserError(f"{what} is damaged: {changed[0]} is not what was written ({len(changed)} of {len(leaves)} arrays)")
            return _unnamed(state, leaves), Position(**content["position"])
        except Exception as error:
            if isinstance(error, UserError | MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise
            why = first_line(error) or type(error).__name__
            if "tree structures do not match" in why:
                raise OtherState(
                    f"{what} holds other arrays than this run has: it is of another training.optimizer, training.moments_dtype, adapter or "
                    "model. Put back what was changed, or start a new run under another name=…"
                ) from error
            raise UserError(f"{what} cannot be read into this run: {why}") from error

    def wait(self) -> None:
        """Until everything is on disk. Raises UserError where it cannot be."""
        with self._writing():
            self.manager.wait_until_finished()

    def close(self) -> None:
        with self._writing():
            try:
                self.manager.wait_until_finished()
            finally:
                self.manager.close()  # which raises the same once more

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What orbax raises where a file cannot be written (it writes aside and renames: what was saved before stays whole)."""
        try:
            yield
        except (ValueError, OSError) as error:
            full = "RESOURCE_EXHAUSTED" in str(error) or getattr(error, "errno", None) == errno.ENOSPC
            why = "the disk is full" if full else first_line(error)
            step = self.latest_step()
            kept = "no checkpoint is there" if step is None else f"checkpoint {step} is whole: --resume continues from it"
            raise UserError(
                f"{self.manager.directory}: a checkpoint cannot be written: {why}. Make room, or set runs_dir to another disk; {kept}"
            ) from error


def verify(run: Path) -> Iterator[tuple[int, str]]:
    """(step, what is wrong with it, "" for nothing) of each checkpoint in a run's folder, read as numbers on the host: no model is made."""
    _tell_once()
    folder = (run / "checkpoints").absolute()
    for step in sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal()):
        try:
            with ocp.PyTreeCheckpointer() as reader:
                tree: Any = reader.metadata(folder / str(step) / "state")
                numbers = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree.item_metadata.tree)
                named = reader.restore(folder / str(step) / "state", ocp.args.PyTreeRestore(restore_args=numbers))
            content = json.loads((folder / str(step) / "position" / "metadata").read_text())
            sums, digest = content.get("checksums"), content.pop("sha256", None)
            if digest is None:
                yield step, "" if sums is None else "its data position is not what was written"
                continue
            found = checksums(named)
            changed = [name for name in sums if found.get(name) != sums[name]]
            wrong = "its data position is not what was written" if digest != _digest(content) else ""
            yield step, wrong or (f"{changed[0]} is not what was written ({len(changed)} of {len(sums)} arrays)" if changed else "")
        except Exception as error:  # noqa: BLE001 (whatever orbax raises for a file that is not whole)
            yield step, f"cannot be read: {first_line(error) or type(error).__name__}"


@cache
def _tell_once() -> None:
    """What cannot be read or written is one exception. orbax reads and writes all arrays at once: the others fail after it, in threads and
    in tasks that nobody waits for, with a traceback each, some of them long after it."""
    usual = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            usual(unraisable)

    sys.unraisablehook = hook
    for name in ("absl", "asyncio"):  # orbax logs each by the first
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _named(state: TrainState) -> dict[str, jax.Array]:
    """A flat dict by path: what lies on disk does not depend on the classes of optimizer states or variables."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _unnamed(state: TrainState, leaves: dict[str, jax.Array]) -> TrainState:
    """The other way round: `leaves` in the places of `state`."""
    restored: TrainState = jax.tree.unflatten(jax.tree.structure(state), [leaves[name] for name in _named(state)])
    return restored


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def checksums(named: dict[str, jax.Array]) -> dict[str, list[int]]:
    """Two 32-bit sums of each array: computed where it lies, as fast as it can be read."""
    return {name: [int(part) for part in sums] for name, sums in jax.device_get(_sums(named)).items()}


@jax.jit
def _sums(named: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """uint32 [2] of each array. Every element is mixed with its place by a bijection (MurmurHash3's last step), so that one changed
    element always shows, and several do but for a chance of 2^-64; sums of integers are the same on every device."""

    def mixed(x: jax.Array, seed: int) -> jax.Array:
        number = jnp.zeros(x.shape, jnp.uint32)  # of each element: in its own shape, as a flat one would be gathered from a mesh
        for axis, size in enumerate(x.shape):
            number = number * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        x = x ^ (number * jnp.uint32(2654435769) + jnp.uint32(seed))
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            x = (x ^ (x >> shift)) * jnp.uint32(factor)
        return jnp.sum(x ^ (x >> 16), dtype=jnp.uint32)

    def sums(array: jax.Array) -> jax.Array:
        width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[array.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(array, width).astype(jnp.uint32)
        return jnp.stack([mixed(bits, 0), mixed(bits, 0x5BD1E995)])

    return {name: sums(array) for name, array in named.items()}
