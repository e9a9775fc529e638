"""`moejax expert-load RUN --data FILE`: count tokens per expert over a data set, before and after tuning."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejax.commands.arguments import add_mesh, check_counts, on_mesh
from moejax.files import replace_text
from moejax.runtime import prepare_jax_for

if TYPE_CHECKING:
    from rich.table import Table

    from moejax.config_mesh import MeshConfig

MOST_COLUMNS = 12  # experts that a table of 80 columns shows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a finished run, e.g. runs/demo")
    add_mesh(parser)
    parser.add_argument(
        "--data", required=True, metavar="FILE",
        help="records in the form of the training data (.json, .jsonl, .csv, .parquet)",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, default=None, metavar="N", help="use only the first N records")


def run(options: argparse.Namespace) -> int:
    """Counts by the base and by the tuned model, as table, JSON, figure and TensorBoard image in the run's folder."""
    prepare_jax_for(options.run)
    with on_mesh(options) as mesh:
        return _run(options, mesh)


def _run(options: argparse.Namespace, mesh: MeshConfig | None) -> int:
    from moejax import processes
    from moejax.data.pipeline import in_order
    from moejax.data.sources import load_records
    from moejax.evaluation.expert_load import count, draw, summarize, write_image
    from moejax.runs.open import load, open_run, tuned
    from moejax.terminal import Console

    folder, data = Path(options.run), options.data
    experiment = open_run(folder)
    check_counts(options, "limit")
    records = load_records(experiment.data, data)[: options.limit]
    processes.same({"data": records})
    make, sizes, tokenizer, *_ = load(folder, True, mesh)
    batches = in_order(experiment.data, records, tokenizer, experiment.seed, data)
    model = make()
    counts = {"base": count(model, batches)}  # a fresh adapter's B is zero: the model is its base
    counts["tuned"] = count(tuned(experiment, sizes, folder, model), batches)
    result = summarize(counts, batches, data, sizes)
    if processes.is_first():
        replace_text(folder / "expert_load.json", json.dumps(result, indent=1) + "\n")
        write_image(folder, draw(result, folder))
    console = Console()
    for name in counts:
        console.print(table(result, name))
    if len(batches.queries) < len(records):
        console.print(f"{len(records) - len(batches.queries):,} of {len(records):,} records were left out: blank, or their answer cut off")
    console.print(f"{folder}/expert_load.json, .png, .svg; TensorBoard's Images tab: expert_load", soft_wrap=True)
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
    for layer, row, variance in zip(result["layers"], load, model["layer_variance"], strict=True):
        out.add_row(str(layer), *cells(row), f"{variance:.2f}")
    out.add_section()
    out.add_row("mean", *cells(np.array(model["tokens_per_query"])), f"{model['variance']:.2f}")
    return out
