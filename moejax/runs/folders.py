"""A run's folder: made once, never overwritten, resumed only with the config that made it."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from moejax.config import Experiment, dump, load
from moejax.config_sources import FieldNames
from moejax.contents import MadeOf
from moejax.errors import UserError
from moejax.files import replace_text
from moejax.models.config import target_aliases
from moejax.runs.claim import LOCK

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def prepare(experiment: Experiment, *, resume: bool) -> MadeOf | None:
    """Look at the folder of this run. Returns what a run that is resumed was made of, if it says so.

    Raises UserError if the folder exists without `resume`, or was made by another config. Where contents are known, a place may be
    another one: `moved` tells which, and the contents decide.
    """
    folder = folder_of(experiment)
    config = folder / "config.yaml"
    if not resume:
        if config.exists() or (folder.is_dir() and any(path.name != LOCK for path in folder.iterdir())):
            raise UserError(
                f"{folder} exists already: continue that run with --resume, or choose another name=… (nothing was overwritten)"
            )
        return None
    if not config.exists():
        raise UserError(f"{folder} holds no run to resume (no config.yaml): start without --resume, or check name and runs_dir")
    begun = _begun_with(config)
    allowed = set(_FREE)
    if begun.made_of is not None:
        allowed |= set(moved(begun, experiment))
    if "data" in experiment.checkpoint.resume_with_changed:
        allowed |= {f"data.{key}" for key in ("source", "config_name", "split", "records", "bytes", "sha256")}
    before, now = (_with_our_names(yaml.safe_load(dump(e))) for e in (begun, experiment))
    changed = [d for d in differences(before, now) if not any(d.startswith((f"{key}:", f"{key}.")) for key in allowed)]
    if changed:
        raise UserError(
            f"cannot resume {folder} with another config. Changed: {'; '.join(changed)}. "
            "Undo the change, or start a new run under another name=…"
        )
    return begun.made_of


def _with_our_names(config: dict[str, Any]) -> dict[str, Any]:
    """A dumped config whose adapter calls its targets by our names: [gate_proj, up_proj] is [w1, w3], in any order."""
    adapter, ours = config["adapter"] or {}, target_aliases()
    for key in ("targets", "share"):
        if adapter.get(key) is not None:
            adapter[key] = sorted(ours.get(name, name) for name in adapter[key])
    for key in ("rank", "alpha"):
        if isinstance(adapter.get(key), dict):
            adapter[key] = {ours.get(name, name): value for name, value in adapter[key].items()}
    return config


_FREE = (
    "device", "mesh", "runs_dir", "made_of", "checkpoint.resume_with_changed", "data.streaming", "model.download", "placement.experts",
    "placement.tables", "logging",
)  # fmt: skip
"""What may differ in a resumed run: where it computes, where it and its data lie, who hears of it, not what."""


_OLDER_FIELDS = FieldNames(instruction="instruction", input="input", output="output", text="text")
"""What stood in a config where columns were not known by other names."""


def _begun_with(config: Path) -> Experiment:
    """The config that a run began with. A key that is newer than the run has its default, but where the run did something else."""
    begun = load(config)
    if begun.data.fields == _OLDER_FIELDS:
        begun = begun.changed("data", fields=FieldNames())
    t = begun.training
    decayed_all = begun.adapter is None and t.weight_decay > 0
    if decayed_all and "weight_decay_on" not in (yaml.safe_load(config.read_text(encoding="utf-8")).get("training") or {}):
        return begun.changed("training", weight_decay_on="all")
    return begun


def folder_of(experiment: Experiment) -> Path:
    return Path(experiment.runs_dir) / experiment.name


def moved(begun: Experiment, now: Experiment) -> dict[str, str]:
    """Key -> both values, of places whose contents the run knows, and which are others than it began with."""
    m = begun.made_of or MadeOf()
    places = {
        "model.source": (m.base, begun.model.source, now.model.source),
        "tokenizer": (m.tokenizer, begun.tokenizer, now.tokenizer),
        "data.source": (m.data, *(", ".join(one.source for one in e.data.sources) or None for e in (begun, now))),
        "data.eval_source": (m.evaluation, begun.data.eval_source, now.data.eval_source),
        "eval.data": (m.questions, begun.eval and begun.eval.data, now.eval and now.eval.data),
        "adapter.init_from": (m.adapter, begun.adapter and begun.adapter.init_from, now.adapter and now.adapter.init_from),
    }
    found = {
        key: f"{then} -> {here}" for key, (known, then, here) in places.items()
        if known is not None and then != here and (key == "tokenizer" or None not in (then, here))
    }  # fmt: skip
    if "model.source" in found and begun.model.revision != now.model.revision:
        found["model.revision"] = f"{begun.model.revision} -> {now.model.revision}"
    return found


@contextmanager
def kept_if_begun(folder: Path) -> Iterator[None]:
    """A new run that is refused, or cannot be written, before its first step leaves nothing: its name is free again.

    Nothing of a run that was there before is touched. Raises UserError for a disk that is full or fails, whatever was being written.
    """
    new = not any(path.name != LOCK for path in folder.iterdir())
    try:
        try:
            yield
        except OSError as error:
            if error.errno not in _DISK or not Path(error.filename or folder).is_relative_to(folder):
                raise
            raise UserError(
                f"{error.filename or folder} cannot be written ({error.strerror}): make room there, or set runs_dir to another disk. A run "
                "that has a checkpoint goes on with --resume"
            ) from error
    except UserError:
        if new and not _begun(folder):
            for path in folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != LOCK:
                    path.unlink()
        raise


def _begun(folder: Path) -> bool:
    """Whether there is a measurement or a checkpoint in it."""
    metrics, checkpoints = folder / "metrics.jsonl", folder / "checkpoints"
    return (metrics.exists() and metrics.stat().st_size > 0) or any(p.name.isdigit() for p in checkpoints.glob("*"))


def write_config(experiment: Experiment) -> None:
    """Write the resolved config. Replaced whole."""
    folder = folder_of(experiment)
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "config.yaml", dump(experiment))


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Dotted paths at which two configs differ, with both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [d for k in keys for d in differences(before.get(k), now.get(k), f"{path}.{k}" if path else str(k))]
    return [] if before == now else [f"{path}: {before!r} -> {now!r}"]
