"""Mixtral against transformers 4.57.6 in fp32 (tests/oracles/mixtral.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_close_to_largest, decoder, full_logits, hub_tensor, loss_and_gradients

from moejax.hub.names import modules
from moejax.hub.weights import load_weights
from moejax.models.build import build
from moejax.models.cache import init_cache
from moejax.models.decoder import load_balancing_loss

CASES = {"top2": 2, "dense": 8}


@pytest.fixture(scope="module")
def models_by_case(mixtral_folder, reference_config):
    def load(k):
        config = reference_config.replace(experts_per_token=k)
        return load_weights(build(config, dtype=jnp.float32), mixtral_folder, jax.random.key(0))

    return {case: load(k) for case, k in CASES.items()}


@pytest.mark.parametrize("case", CASES)
def test_logits(case, models_by_case, reference_batch, mixtral_vectors):
    model, b = models_by_case[case], reference_batch
    logits = full_logits(model, b.tokens, b.segment_ids, b.positions)
    real = np.asarray(b.segment_ids) > 0
    np.testing.assert_allclose(np.asarray(logits)[real], mixtral_vectors[f"{case}/logits"][real], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("case", "remat"),
    [("top2", "none"), ("top2", "dots"), ("dense", "full"),
     *(pytest.param(*each, marks=pytest.mark.long) for each in (("top2", "full"), ("dense", "none"), ("dense", "dots")))],
)  # fmt: skip
def test_loss_gradients_and_counts(case, remat, models_by_case, reference_batch, mixtral_vectors):
    model = models_by_case[case]
    loss, stats, gradients = loss_and_gradients(model, reference_batch, remat=remat)
    np.testing.assert_allclose(loss, mixtral_vectors[f"{case}/loss"], rtol=1e-6)
    np.testing.assert_array_equal(stats.counts, mixtral_vectors[f"{case}/counts"])
    aux = load_balancing_loss(stats, jnp.sum(reference_batch.segment_ids > 0))
    np.testing.assert_allclose(aux, mixtral_vectors[f"{case}/aux"], rtol=1e-6)
    for name, place in modules(model.config).items():
        reference = mixtral_vectors[f"{case}/grad/{name}.weight"]
        assert_close_to_largest(hub_tensor(gradients, place), reference, 2e-5, name)


def test_label_smoothing(models_by_case, reference_batch, mixtral_vectors):
    loss, _, gradients = loss_and_gradients(models_by_case["top2"], reference_batch, label_smoothing=0.1)
    np.testing.assert_allclose(loss, mixtral_vectors["smooth/loss"], rtol=1e-6)
    assert_close_to_largest(gradients.head.weight.get_value(), mixtral_vectors["smooth/grad/lm_head.weight"], 2e-5, "head")


def test_auxiliary_loss(models_by_case, reference_batch, mixtral_vectors):
    loss, _, gradients = loss_and_gradients(models_by_case["top2"], reference_batch, aux_loss_coef=0.02)
    np.testing.assert_allclose(loss, mixtral_vectors["with_aux/loss"], rtol=1e-6)
    gate = mixtral_vectors["with_aux/grad/model.layers.0.block_sparse_moe.gate.weight"]
    assert_close_to_largest(gradients.layers.moe.router.weight.get_value()[0], gate, 2e-5, "router")


def test_greedy_decoding(models_by_case, mixtral_vectors):
    """Three prompts of different length in one padded batch: the tokens that transformers generates for each alone."""
    model = models_by_case["top2"]
    prompts = [mixtral_vectors[f"generate/{row}/prompt"] for row in range(3)]
    lengths = jnp.array([len(p) for p in prompts])
    padded = jnp.array([np.pad(p, (0, 8 - len(p))) for p in prompts])
    begin, go_on = decoder(model)
    logits, cache = begin(padded, lengths, init_cache(model, 3, 24))
    tokens = []
    for _ in range(12):
        tokens.append(np.argmax(logits, axis=-1))
        logits, cache = go_on(tokens[-1], cache)
    for row, ours in enumerate(np.stack(tokens, axis=1)):
        np.testing.assert_array_equal(ours, mixtral_vectors[f"generate/{row}/tokens"])


def test_cache_equals_full_pass(models_by_case, reference_batch):
    model, tokens = models_by_case["top2"], reference_batch.tokens[:1]
    t = tokens.shape[1]
    positions = jnp.arange(t)[None]
    full = full_logits(model, tokens, np.ones_like(tokens), positions)[0]
    begin, go_on = decoder(model)
    logits, cache = begin(tokens[:, :4], jnp.array([4]), init_cache(model, 1, t))
    np.testing.assert_allclose(logits[0], full[3], atol=1e-5)
    for i in range(4, t):
        logits, cache = go_on(tokens[:, i], cache)
        np.testing.assert_allclose(logits[0], full[i], atol=1e-5)
