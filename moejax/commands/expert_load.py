"""`moejax expert-load RUN --data FILE`: which experts the tokens of a data set visit, before and after tuning."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejax.commands.arguments import check_counts
from moejax.errors import UserError
from moejax.files import replace_text
from moejax.runtime import prepare_jax_for

if TYPE_CHECKING:
    from rich.table import Table

MOST_COLUMNS = 12  # experts that a table of 80 columns shows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "a finished run's folder, e.g. runs/demo; or an experiment in YAML: its base model alone"
    parser.add_argument("run", nargs="?", default=None, metavar="RUN | CONFIG", help=what)
    parser.add_argument("--config", default=None, metavar="CONFIG", help="the latter by name")
    parser.add_argument("--data", required=True, metavar="FILE", help="records like those trained on (.json, .jsonl, .csv, .parquet)")
    parser.add_argument("--limit", type=int, default=None, metavar="N", help="only the first so many records")


def run(options: argparse.Namespace) -> int:
    """Counts by the base and by the run's tuned model (with a config: by the base alone), as table, JSON, figure and TensorBoard image.

    They are written to the run's folder, or to runs_dir/NAME-expert-load for a config.
    """
    if options.config is None and str(options.run).endswith((".yaml", ".yml")):
        options.run, options.config = None, options.run
    prepare_jax_for(options.run, options.config)
    from moejax import config as experiments
    from moejax.data.pipeline import in_order
    from moejax.data.sources import load_records
    from moejax.data.tokenizer import check_vocabulary, load_tokenizer
    from moejax.evaluation.expert_load import count, draw, summarize, write_image
    from moejax.hub import weights
    from moejax.hub.model import architecture, create_model
    from moejax.runs.open import base_model, check_made_of, open_run, tuned
    from moejax.terminal import Console

    run_folder, config_file, data, limit = options.run, options.config, options.data, options.limit
    if (run_folder is None) == (config_file is None):
        raise UserError("give a finished run's folder, or the CONFIG of a model that was not trained")
    if run_folder is not None:
        folder = Path(run_folder)
        experiment = open_run(folder)
    else:
        experiment = experiments.load(str(config_file))
        folder = Path(experiment.runs_dir) / f"{experiment.name}-expert-load"
    check_counts(options, "limit")
    source = experiment.model.source
    model_folder = None if source is None else weights.resolve(source, experiment.model.revision)
    if experiment.tokenizer is None and model_folder is None:
        raise UserError(f"{run_folder or config_file}: its config names no tokenizer, so {data} cannot become tokens")
    records = load_records(experiment.data, data)[:limit]
    sizes = architecture(experiment, model_folder)
    tokenizer = load_tokenizer(experiment.tokenizer or str(model_folder), experiment.added_tokens)
    check_vocabulary(tokenizer, sizes.vocab_size)
    if run_folder is not None:
        check_made_of(folder, experiment, model_folder, tokenizer)
    batches = in_order(experiment.data, records, tokenizer, experiment.seed, data)
    if run_folder is None:
        model = create_model(experiment, sizes, model_folder)
    else:
        model = base_model(folder, experiment, sizes, model_folder)
    counts = {"base": count(model, batches)}  # a fresh adapter's B is zero: the model is its base
    if run_folder is not None:
        counts["tuned"] = count(tuned(experiment, sizes, folder, model), batches)
    result = summarize(counts, batches, data, sizes.experts_per_token)
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "expert_load.json", json.dumps(result, indent=1) + "\n")
    picture = draw(result, folder)
    write_image(folder, picture)
    console = Console()
    for name in counts:
        console.print(table(result, name))
    if len(batches.queries) < len(records):
        console.print(f"{len(records) - len(batches.queries):,} of {len(records):,} records were left out: blank, or their answer cut off")
    console.print(
        f"{folder}/expert_load.json, .png, .svg; TensorBoard's Images tab: expert_load", soft_wrap=True
    )
    return 0


def table(result: dict[str, Any], name: str) -> Table:
    """Tokens per query of every layer and expert; of more experts than a terminal shows, the ends: all are in expert_load.json."""
    import numpy as np

    from moejax.terminal import figures

    model = result["models"][name]
    load = np.array(model["counts"]) / result["queries"]
    title = f"{name}: tokens per query, {result['queries']:,} queries of {result['data']}"
    few = load.shape[1] <= MOST_COLUMNS
    names = [str(e) for e in range(load.shape[1])] if few else ["least", "median", "most", "of expert"]

    def cells(row: np.ndarray) -> list[str]:
        shown = row if few else (row.min(), np.median(row), row.max())
        return [f"{value:.1f}" for value in shown] + ([] if few else [str(row.argmax())])

    out = figures("layer", *names, "variance", title=title)
    for layer, (row, variance) in enumerate(zip(load, model["layer_variance"], strict=True)):
        out.add_row(str(layer), *cells(row), f"{variance:.2f}")
    out.add_section()
    out.add_row("mean", *cells(np.array(model["tokens_per_query"])), f"{model['variance']:.2f}")
    return out
