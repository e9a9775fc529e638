"""What a run reads before it has a model: tokenizer, problems, data. Shown with one example, and checked; by --dry-run too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moejax.config import Experiment
from moejax.data.pipeline import Dataset
from moejax.data.pipeline import load as load_data
from moejax.data.tokenizer import check_vocabulary, load_tokenizer
from moejax.models.config import Architecture
from moejax.progress import waiting
from moejax.terminal import Console
from moejax.training import example, held_out
from moejax.training.run_steps import check_profile, check_steps


def read_data(
    experiment: Experiment, config: Architecture, model_folder: Path | None, console: Console
) -> tuple[Any, held_out.HeldOut | None, Dataset]:
    """Tokenizer (None for random tokens), the `eval:` section's problems and the data, as the run has them; shown and checked."""
    tokenizer = None
    if experiment.data.source is not None:
        tokenizer = load_tokenizer(experiment.tokenizer or str(model_folder), experiment.added_tokens)
        check_vocabulary(tokenizer, config.vocab_size)
    with waiting(console, "reading the data"):
        asked = held_out.prepare(experiment, tokenizer, config.max_position_embeddings)
        dataset = load_data(experiment.data, tokenizer, experiment.seed, config.vocab_size)
    console.print(f"data: {dataset.source}", soft_wrap=True)
    console.print(dataset.table())
    for note in dataset.notes():
        console.print(note, soft_wrap=True)
    if tokenizer is not None:
        for line in example.lines(dataset.train.queries[0], tokenizer):
            console.print(line, soft_wrap=True)
    if asked is not None and asked.why_no_loss:
        console.print(f"no eval/loss: {asked.why_no_loss}", soft_wrap=True)
    check_profile(experiment, dataset)
    for line in check_steps(experiment, dataset):
        console.print(line, soft_wrap=True)
    return tokenizer, asked, dataset


def not_local(experiment: Experiment, model_folder: Path | None) -> str | None:
    """What of tokenizer and data is not on this machine, as key = value; None where all of it is."""
    data, places = experiment.data, {}
    if data.source is None:
        return None
    for key, name in {"data.source": data.source, "data.eval_source": data.eval_source}.items():
        if name is not None and not Path(name).exists():
            places[key] = name
    tokenizer = experiment.tokenizer
    if tokenizer is not None and not Path(tokenizer).exists():
        places["tokenizer"] = tokenizer
    if tokenizer is None and model_folder is None:
        places["model.source"] = str(experiment.model.source)
    return next((f"{key} = {name}" for key, name in places.items()), None)
