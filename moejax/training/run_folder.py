"""A run's folder: made once, never overwritten, resumed only with the config that made it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from moejax.config import Experiment, dump, load
from moejax.errors import UserError
from moejax.files import replace_text


def prepare(experiment: Experiment, *, resume: bool) -> Path:
    """The folder of this run. Raises UserError if it exists without `resume`, or was made by another config."""
    folder = Path(experiment.runs_dir) / experiment.name
    config = folder / "config.yaml"
    if not resume:
        if config.exists() or (folder.is_dir() and any(folder.iterdir())):
            raise UserError(
                f"{folder} exists already: continue that run with --resume, or choose another name=… (nothing was overwritten)"
            )
        return folder
    if not config.exists():
        raise UserError(f"{folder} holds no run to resume (no config.yaml): start without --resume, or check name and runs_dir")
    # Read through the schema: a key that is newer than the run has its default. Where the run computes may change, what it computes not.
    before, now = (yaml.safe_load(dump(e)) | {"device": None} for e in (load(config), experiment))
    changed = differences(before, now)
    if changed:
        raise UserError(
            f"cannot resume {folder} with another config. Changed: {'; '.join(changed)}. "
            "Undo the change, or start a new run under another name=…"
        )
    return folder


def write_config(folder: Path, experiment: Experiment) -> None:
    """Write the resolved config, once."""
    path = folder / "config.yaml"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(path, dump(experiment))


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Dotted paths at which two configs differ, with both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [d for k in keys for d in differences(before.get(k), now.get(k), f"{path}.{k}" if path else str(k))]
    return [] if before == now else [f"{path}: {before!r} -> {now!r}"]
