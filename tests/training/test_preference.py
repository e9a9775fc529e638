"""Preference training against TRL 1.16's DPOTrainer (tests/oracles/preferences.py): an adapter whose B is not zero, on everything."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles.drawn import weight
from safetensors.numpy import load_file, save_file
from support import assert_close_to_largest, hub_folder, read_vectors

from moejax.config_data import DataConfig
from moejax.config_preference import PreferenceConfig
from moejax.data.batch import PairBatch
from moejax.data.batching import Batches
from moejax.data.tokenize import Query
from moejax.hub import peft
from moejax.hub.weights import load_weights, read_config
from moejax.models.build import build
from moejax.models.config import LoRAConfig
from moejax.training.preference import Side, losses, numbered_anew, pairs_in, sides_of
from moejax.training.program import split
from moejax.training.step import Objective, sums

MAX_LENGTH, SMOOTHING = 16, 0.1
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MODELS = {
    "mixtral": LoRAConfig(4, 8.0, targets=("w1", "w2", "w3", "gate", *ATTENTION), share=("w1", "w3")),
    "qwen3_moe": LoRAConfig(2, 4.0, share=("gate_proj", "up_proj")),
}


@pytest.fixture(scope="module")
def vectors():
    return read_vectors("preferences")


@pytest.fixture(scope="module")
def models(vectors, tmp_path_factory):
    """Both models with TRL's adapter."""
    made = {}
    for name, adapter in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        if name == "mixtral":
            hub_folder(read_vectors("mixtral"), folder)
        else:
            known = read_vectors("families")
            (folder / "config.json").write_text(str(known[f"{name}/config"]))
            shapes = {key.removeprefix(f"{name}/grad/"): v.shape for key, v in known.items() if key.startswith(f"{name}/grad/")}
            save_file({key: weight(key, shape) for key, shape in shapes.items()}, str(folder / "model.safetensors"))
        (folder / "adapter").mkdir()
        (folder / "adapter/adapter_config.json").write_text(str(vectors[f"{name}/adapter_config"]))
        (folder / "adapter/adapter_model.safetensors").write_bytes(vectors[f"{name}/adapter"].tobytes())
        model = load_weights(build(read_config(folder), dtype=jnp.float32, adapter=adapter), folder, jax.random.key(0))
        peft.load_adapter(model, folder / "adapter")
        made[name] = split(model, full=False)
    return made


def batch_of(vectors, name, batching="pack", **more):
    """TRL's pairs as one micro-batch of ours, packed two a row."""
    pairs = json.loads(str(vectors[f"{name}/pairs"]))
    queries = []
    for pair in pairs:
        for side in ("chosen_ids", "rejected_ids"):
            whole = Query.after(len(pair["prompt_ids"]), np.array(pair["prompt_ids"] + pair[side], np.int32))
            queries.append(Query(whole.ids[:MAX_LENGTH], whole.supervised[:MAX_LENGTH]))
    settings = {"row_tokens": 64, "max_length": MAX_LENGTH, "batch_rows": 2 if batching == "pack" else 8} | more
    data = DataConfig(source="x", batching=batching, shuffle=False, **settings)
    (batch,) = Batches(queries, data, 0, pairs=True).iterate(0)
    return batch, [q for row in Batches(queries, data, 0, pairs=True)._rows(0) for q in row[::2]]


def in_vectors_order(values, order):
    """Numbers by pair in the vectors' order, from those in the batch's."""
    found = np.empty(len(order))
    found[[number // 2 for number in order]] = np.asarray(values)[: len(order)]
    return found


@partial(jax.jit, static_argnums=(0, 4))
def sides(graphdef, trainable, frozen, batch, remat="none"):
    return sides_of(nnx.merge(graphdef, trainable, frozen), batch, chunk_tokens=16, remat=remat)[0]


@partial(jax.jit, static_argnums=0)
def pulled_back(graphdef, trainable, frozen, batch, cotangents):
    """Gradients of Σ cotangents · ratios by the adapter."""

    def ratios(trainable):
        chosen, rejected = sides_of(nnx.merge(graphdef, trainable, frozen), batch, chunk_tokens=16, remat="full")[0]
        return chosen.ratios, rejected.ratios

    return jax.vjp(ratios, trainable)[1](cotangents)[0]


def assert_gradients(found, model, vectors, case, folder):
    graphdef, _, frozen = model
    peft.save_adapter(nnx.merge(graphdef, found, frozen), folder, "base", fused=True)
    ours = load_file(str(folder / "adapter_model.safetensors"))
    expected = {key.removeprefix(f"{case}/grad/"): value for key, value in vectors.items() if key.startswith(f"{case}/grad/")}
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        assert_close_to_largest(ours[key], value, 2e-5, key)


@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_and_rewards_of_each_pair(name, models, vectors):
    """Of the answers' tokens alone, and with every adapter off for the reference: the router's, of Mixtral, too."""
    batch, order = batch_of(vectors, name)
    assert int(pairs_in(batch)) == 4 and batch.tokens.shape == (2, 64)
    chosen, rejected = sides(*models[name], batch)
    beta = 0.1  # of TRL's rewards
    for side, found in (("chosen", chosen), ("rejected", rejected)):
        np.testing.assert_allclose(in_vectors_order(found.logps, order), vectors[f"{name}/logps/{side}"], rtol=1e-6)
        rewards = vectors[f"{name}/rewards/{side}"]
        assert np.abs(rewards).min() > 0.01
        np.testing.assert_allclose(beta * in_vectors_order(found.ratios, order), rewards, rtol=1e-4, atol=1e-5)
    assert (np.asarray(chosen.tokens)[:4].sum(), np.asarray(rejected.tokens)[:4].sum()) == (7 + 2 + 5 + 6, 4 + 9 + 8 + 3)


CASES = [(kind, beta) for kind in ("sigmoid", "robust", "ipo", "cdpo") for beta in (0.1, 0.5)]


def settings_of(kind, beta):
    smoothing = SMOOTHING if kind in ("robust", "cdpo") else 0.0
    return PreferenceConfig(loss="sigmoid" if kind == "cdpo" else kind, beta=beta, label_smoothing=smoothing)


@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_losses_and_gradients(kind, beta, models, vectors, tmp_path):
    batch, _ = batch_of(vectors, "mixtral")
    chosen, rejected = sides(*models["mixtral"], batch)

    def loss(ratios):
        both = (Side(side.logps[:4], r[:4], side.tokens[:4]) for side, r in zip((chosen, rejected), ratios, strict=True))
        return jnp.mean(losses(*both, settings_of(kind, beta)))

    found, cotangents = jax.value_and_grad(loss)((chosen.ratios, rejected.ratios))
    np.testing.assert_allclose(found, vectors[f"mixtral/{kind}/{beta}/loss"], rtol=1e-5)
    gradients = pulled_back(*models["mixtral"], batch, cotangents)
    assert_gradients(gradients, models["mixtral"], vectors, f"mixtral/{kind}/{beta}", tmp_path)


@partial(jax.jit, static_argnums=0)
def mean(objective, trainable, frozen, batch):
    def total(trainable):
        loss, (found, _) = sums(objective, trainable, frozen, batch, None)
        return loss / pairs_in(batch), found

    return jax.value_and_grad(total, has_aux=True)(trainable)


@pytest.mark.parametrize(
    ("name", "case", "more"),
    [
        ("mixtral", "balanced/0.1", {"aux_loss_coef": 0.02}),
        pytest.param("qwen3_moe", "ipo/0.5", {}, marks=pytest.mark.long),
        pytest.param("qwen3_moe", "sigmoid/0.1", {}, marks=pytest.mark.long),
    ],
)
def test_what_a_step_minimizes(name, case, more, models, vectors, tmp_path):
    """The same through the training step's own sums; with the load-balancing loss where it is asked for."""
    kind, beta = case.split("/")
    graphdef, trainable, frozen = models[name]
    settings = settings_of("sigmoid" if kind == "balanced" else kind, float(beta))
    objective = Objective(graphdef, full=False, chunk_tokens=16, preference=settings, **more)
    batch, _ = batch_of(vectors, name)
    (loss, found), gradients = mean(objective, trainable, frozen, batch)
    np.testing.assert_allclose(loss, vectors[f"{name}/{case}/loss"], rtol=1e-5)
    assert_gradients(gradients, models[name], vectors, f"{name}/{case}", tmp_path)
    for side in ("chosen", "rejected"):
        np.testing.assert_allclose(found[f"logps/{side}"] / 4, vectors[f"{name}/logps/{side}"].mean(), rtol=1e-6)
        np.testing.assert_allclose(found[f"rewards/{side}"] / 4, float(beta) / 0.1 * vectors[f"{name}/rewards/{side}"].mean(), rtol=1e-4)
    np.testing.assert_allclose(found["rewards/margins"], found["rewards/chosen"] - found["rewards/rejected"], rtol=1e-5)
    assert found["rewards/accuracies"] == vectors[f"{name}/rewards/accuracies"].sum()
    assert found["logps/accuracies"] == (vectors[f"{name}/logps/chosen"] > vectors[f"{name}/logps/rejected"]).sum()


def test_a_side_a_row_is_the_same_as_packed(models, vectors):
    padded, _ = batch_of(vectors, "mixtral", "pad_longest", batch_rows=10)  # and an empty pair
    assert isinstance(padded, PairBatch) and padded.tokens.shape == (10, 16)
    batch, order = batch_of(vectors, "mixtral")
    for found, packed in zip(sides(*models["mixtral"], padded), sides(*models["mixtral"], batch), strict=True):
        np.testing.assert_allclose(found.logps[:4], in_vectors_order(packed.logps, order), rtol=1e-6)
        assert not np.asarray(found.logps[4:]).any()


def test_a_devices_rows_number_their_own_pairs():
    """Of four rows whose pairs are numbered through, two devices have two each; the last row is empty."""
    sides = np.array([[[1, 1, 2, 0], [3, 3, 4, 4], [5, 6, 7, 8], [0, 0, 0, 0]]], np.int32)
    batch = PairBatch(*(sides,) * 5, sides)
    parts = [jax.tree.map(lambda a, at=at: a[:, at : at + 2], batch) for at in (0, 2)]
    found = [numbered_anew(part) for part in parts]
    assert [part.sides.tolist() for part in found] == [[[[1, 1, 2, 0], [3, 3, 4, 4]]], [[[1, 2, 3, 4], [0, 0, 0, 0]]]]
    assert sum(float(pairs_in(part)) for part in found) == float(pairs_in(batch)) == 4
