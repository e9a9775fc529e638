"""Which experts the tokens of a data set visit (the study's figure 11)."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from moejax.compiler_options import jit
from moejax.data.batching import Batches
from moejax.files import replacing, save_figure
from moejax.mesh import WHOLE, of_model
from moejax.models.build import Model
from moejax.models.config import Architecture
from moejax.models.ops.spread import AXIS

COLORS = {"base": "#a0aec0", "tuned": "#2b6cb0"}


def count(model: Model, batches: Batches) -> np.ndarray:
    """int64 [L, E]: how often each layer's experts were chosen, by real tokens only."""
    graphdef, state = nnx.split(model)
    devices = of_model(state)

    def choices(state: Any, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, state)(tokens, segment_ids, positions)[1].counts

    @jit
    def over_devices(state: Any, *rows: jax.Array) -> Any:
        if devices is None:
            return choices(state, *rows)
        places = devices.of_weights(state), *devices.of_rows(rows)
        return devices.over_rows(lambda *own: jax.lax.psum(choices(*own), AXIS), places, WHOLE, state, *rows)

    found = np.zeros((), np.int64)
    for b in batches.iterate(0):
        more = 0 if devices is None else devices.whole_rows(len(b.tokens)) - len(b.tokens)  # rows of padding
        rows = (np.pad(part, ((0, more), (0, 0))) for part in (b.tokens, b.segment_ids, b.positions))
        found = found + np.asarray(over_devices(state, *rows), np.int64)
    return found


def load_variance(load: np.ndarray) -> float:
    """Sample variance (the sum over E - 1) of tokens per query over the experts, load [E].

    The study's figure 11 shows tokens per query, mean over queries and layers, of the experts 0 to 7, and prints this variance for
    BlackMamba and for one of Mixtral's four data sets and models; next to the other three stands the population variance (over E).
    """
    return float(load.var(ddof=1)) if load.size > 1 else 0.0


def summarize(counts: dict[str, np.ndarray], batches: Batches, data: str, config: Architecture) -> dict[str, Any]:
    """What expert_load.json holds. layers: the model's own numbers of those that have experts; tokens_per_query: mean over them, by expert,
    as figure 11 has it."""
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
    about = {"data": data, "queries": queries, "tokens": tokens, "top_k": config.experts_per_token}
    return about | {"layers": list(config.expert_layer_numbers), "models": models}


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
    bars.set(xlabel="expert", ylabel="tokens per query, mean over layers", xticks=range(0, experts, max(1, experts // 8)))
    bars.spines[["top", "right"]].set_visible(False)
    bars.set_ylim(0, 1.25 * max(max(m["tokens_per_query"]) for m in models.values()))
    bars.legend(frameon=False, loc="upper left")
    rows = range(0, layers, max(1, layers // 8))
    largest = max(float(load.max()) for load in loads.values())
    for axes, (name, load) in zip(maps, loads.items(), strict=True):
        image = axes.imshow(load, aspect="auto", cmap="viridis", vmin=0, vmax=largest)
        axes.set(title=name, xlabel="expert", xticks=range(0, experts, max(1, experts // 8)))
        axes.set_yticks(rows, [result["layers"][row] for row in rows])
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
