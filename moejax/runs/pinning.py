"""What a run took from the Hub, by commit, and what its family decided: a rerun of its config.yaml does the same, whatever becomes of
branches and defaults."""

from __future__ import annotations

from pathlib import Path

from moejax.config import AUTO_TOKENS, Experiment, load
from moejax.hub import snapshot


def pinned(experiment: Experiment, model_folder: Path | None) -> Experiment:
    """The experiment with the commits of what `model.source` (it was resolved to `model_folder`) and `adapter.init_from` name.

    Local folders have none. Raises UserError where init_from is nowhere.
    """
    model, adapter = experiment.model, experiment.adapter
    if model.source is not None and model_folder is not None:
        commit = snapshot.commit(model.source, model_folder)
        if commit is not None:
            experiment = experiment.changed("model", source=_name(model.source), revision=commit)
    if adapter is not None and adapter.init_from is not None:
        commit = snapshot.commit(adapter.init_from, snapshot.resolve(adapter.init_from, field="adapter.init_from"))
        if commit is not None:
            experiment = experiment.changed("adapter", init_from=f"{_name(adapter.init_from)}@{commit}")
    return experiment


def adopted(experiment: Experiment) -> Experiment:
    """The experiment with the commits and the defaults of the run of this name, where it names no other: what a resumed run goes on with.

    A run that is not there, or took something else, is `folders.prepare`'s to refuse.
    """
    path = Path(experiment.runs_dir) / experiment.name / "config.yaml"
    if not path.is_file():
        return experiment
    before = load(path)
    then, now = before.model, experiment.model
    if then.source and now.source and _name(then.source) == _name(now.source) and _pins(then.revision, _at(now.source) or now.revision):
        experiment = experiment.changed("model", source=then.source, revision=then.revision)
    theirs, ours = (None if e.adapter is None else e.adapter.init_from for e in (before, experiment))
    if theirs and ours and _name(theirs) == _name(ours) and _pins(_at(theirs), _at(ours)):
        experiment = experiment.changed("adapter", init_from=theirs)
    if before.adapter is not None and experiment.adapter is not None and experiment.adapter.targets is None:
        experiment = experiment.changed("adapter", targets=before.adapter.targets)
    if experiment.added_tokens in (AUTO_TOKENS, before.added_tokens):
        experiment = experiment.model_copy(update={"added_tokens": before.added_tokens})
        if experiment.model.vocabulary is None:
            experiment = experiment.changed("model", vocabulary=before.model.vocabulary)
        if before.adapter is not None and experiment.adapter is not None and experiment.adapter.token_rows is None:
            experiment = experiment.changed("adapter", token_rows=before.adapter.token_rows)
    then_data = {key: getattr(before.data, key) for key in ("template", "template_date") if getattr(experiment.data, key) is None}
    experiment = experiment.changed("data", **then_data)
    if experiment.quantization.modules is None:
        experiment = experiment.changed("quantization", modules=before.quantization.modules)
    return experiment


def _pins(then: str | None, now: str | None) -> bool:
    """Whether the run was pinned to a commit and the command names a branch, or nothing."""
    return snapshot.is_commit(then) and not snapshot.is_commit(now)


def _name(source: str) -> str:
    return source.partition("@")[0]


def _at(source: str) -> str | None:
    return source.partition("@")[2] or None
