"""Expert load: the study's variance, counts by real tokens only, and what `moejax expert-load` leaves behind."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from support import tiny_experiments
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moejax import cli, config
from moejax.commands import expert_load
from moejax.data.batching import assemble
from moejax.data.pipeline import in_order
from moejax.data.sources import load_records
from moejax.data.tokenizer import load_tokenizer
from moejax.evaluation.expert_load import load_variance
from moejax.hub.model import architecture, create_model
from moejax.hub.peft import load_adapter
from moejax.models.config import PRESETS
from moejax.training import metrics

# arXiv 2408.04693, figure 11: tokens per query of experts 0 to 7 (1000 queries; mean over 32 or 18 layers), and the printed variance.
FIGURE_11 = {
    "Mixtral HE": ([46.2043125, 50.46909375, 52.7435625, 59.23575, 38.55515625, 62.8516875, 50.1760625, 51.220375], 55.5),
    "Mixtral HE tuned": (
        [53.154625, 53.3051875, 68.29984375, 47.9185625, 37.65221875, 65.6174375, 47.92340625, 37.58471875], 112.3,
    ),
    "Mixtral GS": ([76.0794375, 78.59934375, 83.197375, 85.96715625, 71.68015625, 86.03346875, 79.856375, 81.2746875], 21.2),
    "Mixtral GS tuned": (
        [80.86328125, 80.56284375, 98.3231875, 71.0319375, 73.931625, 88.5685625, 79.734625, 69.6719375], 79.2,
    ),
    "BlackMamba HE": (
        [44.68616667, 61.46777778, 59.69783333, 56.24111111, 27.41805556, 35.43494444, 42.03094444, 38.97516667], 150.7,
    ),
    "BlackMamba HE tuned": (
        [42.48238889, 54.63505556, 52.70683333, 60.74527778, 31.886, 36.3305, 43.79411111, 43.37183333], 93.3,
    ),
    "BlackMamba GS": (
        [66.51222222, 75.93238889, 78.76505556, 80.60033333, 43.28055556, 53.91127778, 57.32466667, 54.6495], 186.5,
    ),
    "BlackMamba GS tuned": (
        [61.72777778, 75.03205556, 73.14222222, 86.86661111, 43.48988889, 55.45944444, 59.53511111, 55.72288889], 187.9,
    ),
}  # fmt: skip
POPULATION = {"Mixtral HE tuned", "Mixtral GS", "Mixtral GS tuned"}  # where the study divides by the number of experts


@pytest.mark.parametrize("name", FIGURE_11)
def test_the_variance_is_the_studys(name):
    load, printed = FIGURE_11[name]
    variance = load_variance(np.array(load))
    assert (variance * 7 / 8 if name in POPULATION else variance) == pytest.approx(printed, abs=0.051)
    layers = 32 if name.startswith("Mixtral") else 18
    counts = np.array(load) * layers * 1000  # whole tokens: the numbers are means over 1000 queries and all layers
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-4 * layers)


def test_the_metric_of_a_step():
    """Variance over experts of the mean over layers, and of each layer: [2, 4] and [6, 4] tokens per query."""
    record = metrics.expert_load(np.array([[20, 40], [60, 40]]), (1, 3), queries=10)
    assert record["expert_load_variance"] == 0.0
    assert (record["expert_load_variance/layer_1"], record["expert_load_variance/layer_3"]) == (2.0, 2.0)
    assert record["expert_counts"] == [[20, 40], [60, 40]]


def test_a_layer_has_the_models_own_number():
    """A dense layer comes first, or one without experts stands before each."""
    numbers = {preset: PRESETS[preset].expert_layer_numbers for preset in ("deepseek-v2-lite", "blackmamba-1.5b", "olmoe-1b-7b")}
    assert numbers == {
        "deepseek-v2-lite": tuple(range(1, 27)), "blackmamba-1.5b": tuple(range(1, 30, 2)), "olmoe-1b-7b": tuple(range(16)),
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a few steps; its folder, its experiment, its data."""
    folder = tmp_path_factory.mktemp("load")
    training = {"steps": 3, "learning_rate": 0.1, "gradient_accumulation": 1, "remat": "none"}
    experiment = tiny_experiments(folder)(training=training)
    path = folder / "config.yaml"
    path.write_text(config.dump(experiment))
    assert cli.main(["train", "--config", str(path)]) == 0
    return folder / "runs" / "run", experiment, folder / "train.json"


@pytest.fixture(scope="module")
def loaded(run):
    folder, _, data = run
    assert cli.main(["expert-load", str(folder), "--data", str(data), "--limit", "9"]) == 0
    return json.loads((folder / "expert_load.json").read_text())


def test_counts_are_the_models_own(run, loaded):
    """Every query alone in a padded row, by the model itself: the same counts as packed, for base and tuned model."""
    folder, experiment, *_ = run
    model = create_model(experiment, architecture(experiment, None), None)
    queries = in_order(experiment.data, load_records(experiment.data)[:9], load_tokenizer(experiment.tokenizer, ()), 0).queries
    assert loaded["queries"] == 9 and loaded["tokens"] == sum(len(q.ids) for q in queries)
    batch = assemble([[query] for query in queries], 9, 64)

    @jax.jit
    def counts_of(state):
        return nnx.merge(nnx.graphdef(model), state)(batch.tokens, batch.segment_ids, batch.positions)[1].counts

    for name in ("base", "tuned"):
        if name == "tuned":
            load_adapter(model, folder / "adapter")
        counts = np.asarray(counts_of(nnx.state(model)))
        assert loaded["models"][name]["counts"] == counts.tolist()
        assert counts.sum() == loaded["tokens"] * 2 * 2  # tokens · K · L
    assert loaded["models"]["base"]["counts"] != loaded["models"]["tuned"]["counts"]


def test_numbers_follow_from_the_counts(loaded):
    for model in loaded["models"].values():
        load = np.array(model["counts"]) / 9
        np.testing.assert_allclose(model["tokens_per_query"], load.mean(0))
        np.testing.assert_allclose(model["variance"], load.mean(0).var(ddof=1))
        np.testing.assert_allclose(model["population_variance"], load.mean(0).var())
        np.testing.assert_allclose(model["layer_variance"], load.var(axis=1, ddof=1))


def test_pictures(run, loaded):
    folder = run[0]
    png = (folder / "expert_load.png").read_bytes()
    assert png.startswith(b"\x89PNG") and "<svg" in (folder / "expert_load.svg").read_text()
    events = EventAccumulator(str(folder)).Reload()
    (image,) = events.Images("expert_load")
    assert image.encoded_image_string == png and image.width > image.height > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--data", "x.json"], "nowhere is not a finished run"),
        (["RUN", "--data", "x.json"], "x.json does not exist"),
        (["RUN", "--data", "DATA", "--limit", "0"], "--limit 0: expected 1 or more"),
    ],
)
def test_bad_input(arguments, message, run, capsys):
    known = {"RUN": str(run[0]), "DATA": str(run[2])}
    assert cli.main(["expert-load", *(known.get(a, a) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_the_table_of_many_experts_is_their_ends():
    """A terminal of 80 columns shows every cell whole."""
    from rich.console import Console

    load = np.arange(2 * 40).reshape(2, 40)
    of = {"counts": load.tolist(), "layer_variance": [1.0, 2.0], "tokens_per_query": load.mean(0).tolist(), "variance": 3.0}
    console = Console(width=80, record=True)
    console.print(expert_load.table({"models": {"base": of}, "layers": [1, 2], "queries": 1, "data": "some"}, "base"))
    shown = console.export_text()
    assert "…" not in shown and all(name in shown for name in ("least", "median", "most", "of expert"))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    assert rows == [
        ["1", "0.0", "19.5", "39.0", "39", "1.00"], ["2", "40.0", "59.5", "79.0", "39", "2.00"],
        ["mean", "20.0", "39.5", "59.0", "39", "3.00"]
    ]  # fmt: skip
