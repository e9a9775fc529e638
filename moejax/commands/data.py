"""`moejax data CONFIG`: show counts and examples of the training data. Needs only a tokenizer: no weights, no jax; writes nothing."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moejax import config
from moejax.commands.arguments import add_config, settle_config
from moejax.config import Experiment
from moejax.errors import UserError
from moejax.progress import say, waiting


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, "override config values, e.g. data.source=FILE")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(options: argparse.Namespace) -> int:
    settle_config(options)
    experiment = config.load(options.config, options.overrides)
    if experiment.data.source is None:
        raise UserError("data.source is null: the run trains on random tokens, and there are no records to show")
    from moejax.commands.tables import print_json
    from moejax.data.examples import examples, told

    if options.json:
        dataset, tokenizer = read_data(experiment)
        shown = examples(dataset.train.queries, tokenizer, pairs=dataset.tokenized.pairs is not None)
        print_json(
            dataset.document()
            | {"examples": [{"title": e.title, "parts": [{"text": text, "trained": on} for text, on in e.parts]} for e in shown]}
        )
        return 0
    with waiting("reading the data"):
        dataset, tokenizer = read_data(experiment)
    say(*told(dataset, tokenizer))
    return 0


def read_data(experiment: Experiment) -> tuple[Any, Any]:
    """The data as the run has them, and its tokenizer. Of a model that is not here only the small files are fetched."""
    from moejax.data import pipeline
    from moejax.data.added_tokens import settled
    from moejax.data.tokenizer import check_vocabulary, load_tokenizer
    from moejax.estimator.sizes import architecture_of
    from moejax.hub import snapshot

    model = experiment.model
    source = experiment.tokenizer or str(snapshot.resolve(str(model.source), model.revision, weights=False))
    tokenizer = load_tokenizer(source, experiment.added_tokens)
    if model.preset is not None or Path(str(model.source)).is_dir():  # else its sizes are not known here
        own = architecture_of(experiment.changed("model", vocabulary=None)).vocab_size
        check_vocabulary(tokenizer, architecture_of(settled(experiment, source, own)).vocab_size)
    return pipeline.load(experiment.data, tokenizer, experiment.seed, 0, pairs=experiment.preference is not None), tokenizer
