"""A run's metrics in Weights & Biases, for anyone who sets `logging: [tensorboard, wandb]`: the extra `wandb`, imported here alone."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moejax import installation
from moejax.config import Experiment
from moejax.errors import UserError, first_line
from moejax.files import replace_text
from moejax.progress import note, say

ID = "wandb_id"  # the file in a run's folder that holds the id of its run there: a resumed run goes on with it


def check(experiment: Experiment) -> None:
    """Raises UserError where the run is to be logged there and the package is not installed. Imports nothing."""
    if "wandb" not in experiment.logging:
        return
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:  # a folder wandb/ of somebody's runs is found too, and is no package
        raise UserError(
            f"logging = {list(experiment.logging)}: the package wandb is not installed. {installation.for_extra('wandb')}, or take wandb "
            "out of logging"
        )


class WandbRun:
    """What is written goes there too, and whatever fails there never reaches the run: it is noted once, and nothing is sent any more.

    Without a login the run is kept offline, in `folder`/wandb; WANDB_MODE, WANDB_PROJECT and its other variables mean what they say there.
    """

    def __init__(self, folder: Path, experiment: Experiment):
        self._run: Any = None
        with self._failing():
            wandb = importlib.import_module("wandb")
            mode = _mode(wandb)
            try:
                self._run = _begun(wandb, folder, experiment, mode)
            except Exception as error:  # noqa: BLE001  (no network, an account without such a project, …)
                note(f"wandb: {first_line(error) or type(error).__name__}: the run is kept offline")
                self._run = _begun(wandb, folder, experiment, "offline")
            replace_text(folder / ID, self._run.id)
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")  # its own steps only count what is logged
            here = f"run {self._run.id}, offline: wandb sync {Path(self._run.dir).parent} sends it"
            say(f"wandb: {here if self._run.offline else self._run.url}")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self._run is not None:
            with self._failing():
                self._run.log({"step": step, **values})

    def summarize(self, values: Mapping[str, float]) -> None:
        """What is shown of the run as a whole, next to each metric's last value."""
        if self._run is not None:
            with self._failing():
                self._run.summary.update(dict(values))

    def close(self) -> None:
        if self._run is not None:
            with self._failing():
                self._run.finish()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001  (whatever it is, it is not worth a training run)
            note(f"warning: wandb failed ({first_line(error) or type(error).__name__}): the run continues without it")
            self._run = None


def _mode(wandb: Any) -> str | None:
    """None: as its settings say. Without a login it would ask for one, or fail."""
    if wandb.setup().settings.mode != "online" or wandb.login(prompt=False, verify=False):
        return None
    note("wandb: not logged in (`wandb login`, or WANDB_API_KEY): the run is kept offline")
    return "offline"


def _begun(wandb: Any, folder: Path, experiment: Experiment, mode: str | None) -> Any:
    known = (folder / ID).read_text(encoding="utf-8").strip() if (folder / ID).is_file() else None
    return wandb.init(
        project=os.environ.get("WANDB_PROJECT", "moejax"), name=experiment.name, dir=str(folder), mode=mode, reinit="create_new",
        id=known, resume="allow" if known else None, config=experiment.model_dump(mode="json"),
        settings=wandb.Settings(console="off", silent=True, finish_timeout=60, finish_timeout_raises=True),
    )  # fmt: skip
