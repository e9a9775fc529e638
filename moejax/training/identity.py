"""Whether a run goes on with what it was made of: asked as early as each content is known, written into its config.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from moejax import config, processes
from moejax.config import Experiment
from moejax.contents import MadeOf, base_content, files_content, records_content, tokenizer_content
from moejax.data.pipeline import Dataset
from moejax.hub import snapshot, weights
from moejax.runs import folders
from moejax.training.run_steps import total_steps
from moejax.training.scoring import HeldOut


class Identity:
    """What this process reads, next to what the run was made of. What compares returns lines to be reported.

    before: of the run that is resumed, or of the run whose config.yaml a new run repeats; None where nobody says. A resumed run is
    refused (UserError) where contents differ that it was not asked to change; a new run is reported.
    """

    def __init__(self, experiment: Experiment, before: MadeOf | None, *, resume: bool):
        self.experiment, self.before, self.resume = experiment, before, resume
        self.now = MadeOf(platform=jax.default_backend())
        self.changed: list[str] = []
        self.moved: dict[str, str] = {}

    def of_data(self, tokenizer: Any, asked: HeldOut | None, dataset: Dataset, model_folder: Path | None) -> list[str]:
        """Data, tokenizer, adapter, the number of steps; and the weights' files where they are here already."""
        e, a = self.experiment, self.experiment.adapter
        now: dict[str, Any] = {**dataset.contents, "steps": total_steps(e, dataset)}
        if asked is not None:
            now["questions"] = records_content([example.record, example.expected, []] for example in asked.examples)
        if tokenizer is not None:
            now["tokenizer"] = tokenizer_content(e.tokenizer or str(model_folder), tokenizer)
        if a is not None and a.init_from is not None:
            folder = snapshot.resolve(a.init_from, field="adapter.init_from")
            files = (folder / f"adapter_{name}" for name in ("config.json", "model.safetensors", "model.bin"))
            now["adapter"] = files_content(path for path in files if path.is_file())
        told = []
        if self.resume:
            begun = config.load(folders.folder_of(e) / "config.yaml")
            self.moved = folders.moved(begun, e)
            told = [f"{key}: {both}: another place; the contents decide" for key, both in self.moved.items()]
            if self.before is None:
                told.append(f"note: {folders.folder_of(e)} was begun by a version that kept no hashes: its contents cannot be compared")
        if model_folder is not None:
            now |= {"base_config": base_content(model_folder), "base_files": weights.files_of(model_folder)}
        return told + self.compare(**now)

    def written(self, experiment: Experiment) -> Experiment:
        """The experiment, all of it settled, with what it is made of: as the run's config.yaml now has it."""
        history = self.before.changed if self.resume and self.before is not None else ()
        made_of = self.now.model_copy(update={"changed": (*history, *self.changed)})
        experiment = experiment.model_copy(update={"made_of": made_of})
        if processes.is_first() and (not self.resume or self.before is None or self.changed or self.moved):
            folders.write_config(experiment)
        return experiment

    def compare(self, **found: Any) -> list[str]:
        """Contents by their names in `MadeOf`."""
        self.now = self.now.model_copy(update=found)
        if self.before is None:
            return []
        part = MadeOf(platform=self.now.platform, **found)
        if not self.resume:
            differences = self.before.model_copy(update={"steps": None}).differences(part)
            return [f"note: not what the config's run was made of: {name}: {text}" for name, text in differences.items()]
        told = self.before.check(part, self.experiment.checkpoint.resume_with_changed, folders.folder_of(self.experiment))
        self.changed += told
        return told
