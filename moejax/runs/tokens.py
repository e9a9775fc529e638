"""The rows that a run trains of embedding and head, before its model is known: of tokens that it adds, and of the adapter that it goes
on with."""

from __future__ import annotations

from pathlib import Path

from moejax.config import Experiment
from moejax.data.added_tokens import settled
from moejax.data.places import is_here
from moejax.hub import weights
from moejax.hub.model import with_adapters_rows


def with_rows(experiment: Experiment, model_folder: Path | None, *, fetch: bool = True) -> Experiment:
    """The experiment with `model.vocabulary` and `adapter.token_rows` as `added_tokens` and `adapter.init_from` have them.

    model_folder: of the base, if it has one. fetch: False asks no network: a tokenizer that is elsewhere is taken to fit into the
    embedding. Raises UserError for tokenizers and rows that do not belong to the model.
    """
    begun = experiment.adapter and experiment.adapter.init_from
    if not experiment.added_tokens and begun is None:
        return experiment
    base = None if model_folder is None else weights.read_config(model_folder, experiment.model.ignored_settings)
    vocab_size = experiment.changed("model", vocabulary=None).model.architecture(base).vocab_size
    source = experiment.tokenizer or (None if model_folder is None else str(model_folder))
    if experiment.added_tokens:
        there = source is not None and (fetch or is_here(source))
        return settled(experiment, source if there else None, vocab_size)
    return with_adapters_rows(experiment, vocab_size) if fetch or is_here(str(begun)) else experiment
