"""`moejax expert-load RUN --data FILE`: which experts the tokens of a data set visit, before and after tuning (the study's figure 11)."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.table import Table

from moejax import config as experiments
from moejax.data.batching import Batches
from moejax.data.pipeline import in_order
from moejax.data.sources import load_records
from moejax.data.tokenizer import check_vocabulary, load_tokenizer
from moejax.errors import UserError
from moejax.evaluation.runs import base_model, check_made_of, open_run, tuned
from moejax.files import replace_text, replacing, save_figure
from moejax.hub import weights
from moejax.models.build import Model
from moejax.terminal import Console
from moejax.training.metrics import load_variance
from moejax.training.state import architecture, create_model

COLORS = {"base": "#a0aec0", "tuned": "#2b6cb0"}


def run(run_folder: str | None, config_file: str | None, data: str, limit: int | None) -> int:
    """Counts by the base and by the run's tuned model (with a config: by the base alone), as table, JSON, figure and TensorBoard image.

    They are written to the run's folder, or to runs_dir/NAME-expert-load for a config.
    """
    if (run_folder is None) == (config_file is None):
        raise UserError("give a finished run's folder, or --config FILE for a model that was not trained")
    if run_folder is not None:
        folder = Path(run_folder)
        experiment = open_run(folder)
    else:
        experiment = experiments.load(str(config_file))
        folder = Path(experiment.runs_dir) / f"{experiment.name}-expert-load"
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: expected 1 or more records")
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


def count(model: Model, batches: Batches) -> np.ndarray:
    """int64 [L, E]: how often each layer's experts were chosen, by real tokens only."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def choices(state: Any, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, state)(tokens, segment_ids, positions)[1].counts

    parts = [np.asarray(choices(state, b.tokens, b.segment_ids, b.positions), np.int64) for b in batches.iterate(0)]
    return np.sum(parts, axis=0)


def summarize(counts: dict[str, np.ndarray], batches: Batches, data: str, top_k: int) -> dict[str, Any]:
    """What expert_load.json holds. tokens_per_query: mean over layers, by expert, as figure 11 has it."""
    queries = len(batches.queries)
    models = {}
    for name, table in counts.items():
        load = table / queries
        mean = load.mean(axis=0)
        models[name] = {
            "counts": table.tolist(),
            "tokens_per_query": mean.tolist(),
            "variance": load_variance(mean),
            "population_variance": float(mean.var()),
            "layer_variance": [load_variance(row) for row in load],
        }
    tokens = sum(len(q.ids) for q in batches.queries)
    return {"data": data, "queries": queries, "tokens": tokens, "top_k": top_k, "models": models}


def table(result: dict[str, Any], name: str) -> Table:
    """Tokens per query of every layer and expert."""
    model = result["models"][name]
    load = np.array(model["counts"]) / result["queries"]
    out = Table(title=f"{name}: tokens per query, {result['queries']:,} queries of {result['data']}", title_justify="left")
    for column in ("layer", *(str(e) for e in range(load.shape[1])), "variance"):
        out.add_column(column, justify="right")
    for layer, (row, variance) in enumerate(zip(load, model["layer_variance"], strict=True)):
        out.add_row(str(layer), *(f"{value:.1f}" for value in row), f"{variance:.2f}")
    out.add_section()
    out.add_row("mean", *(f"{value:.1f}" for value in model["tokens_per_query"]), f"{model['variance']:.2f}")
    return out


def draw(result: dict[str, Any], folder: Path) -> bytes:
    """Bars of the mean over layers, and a map of layers and experts for each model. Writes PNG and SVG; returns the PNG."""
    from matplotlib.figure import Figure

    models = result["models"]
    loads = {name: np.array(model["counts"]) / result["queries"] for name, model in models.items()}
    layers, experts = loads["base"].shape
    figure = Figure(figsize=(4.5 + 3 * len(models), 3.4), layout="constrained")
    bars, *maps = figure.subplots(1, 1 + len(models), width_ratios=[1.5, *(1 for _ in models)])
    width = 0.8 / len(models)
    for index, (name, model) in enumerate(models.items()):
        at = np.arange(experts) + (index - (len(models) - 1) / 2) * width
        label = f"{name}, variance {model['variance']:.1f}"
        bars.bar(at, model["tokens_per_query"], width, color=COLORS[name], label=label)
    bars.set(xlabel="expert", ylabel="tokens per query, mean over layers", xticks=range(experts))
    bars.spines[["top", "right"]].set_visible(False)
    bars.set_ylim(0, 1.25 * max(max(m["tokens_per_query"]) for m in models.values()))
    bars.legend(frameon=False, loc="upper left")
    largest = max(float(load.max()) for load in loads.values())
    for axes, (name, load) in zip(maps, loads.items(), strict=True):
        image = axes.imshow(load, aspect="auto", cmap="viridis", vmin=0, vmax=largest)
        axes.set(title=name, xlabel="expert", xticks=range(experts), yticks=range(0, layers, max(1, layers // 8)))
    maps[0].set_ylabel("layer")
    figure.colorbar(image, ax=maps, label="tokens per query")
    save_figure(figure, folder / "expert_load.svg")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    with replacing(folder / "expert_load.png") as new:
        new.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def write_image(folder: Path, png: bytes) -> None:
    """The figure as an event of TensorBoard's Images tab, with its own event file."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))  # a PNG's header
    image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
    writer = EventFileWriter(str(folder))
    writer.add_event(
        Event(step=0, wall_time=time.time(), summary=Summary(value=[Summary.Value(tag="expert_load", image=image)]))
    )
    writer.close()
