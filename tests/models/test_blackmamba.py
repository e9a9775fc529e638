"""BlackMamba in fp32 against a plain PyTorch implementation of its specification (tests/oracles/blackmamba.py), and what it promises."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import assert_close_to_largest, batch_of, decoder, full_logits, hub_arrays, loss_and_gradients

from moejax.data.batch import Batch
from moejax.hub.save import save_weights
from moejax.hub.weights import load_weights
from moejax.models.build import build
from moejax.models.cache import init_cache
from moejax.models.config import PRESETS, BlackMambaConfig, LoRAConfig, Quantization, from_hub_config
from moejax.training.program import split

CASES = {"top1": (1, "gelu"), "top2": (2, "gelu"), "dense": (4, "gelu"), "top2_silu": (2, "silu")}


@pytest.fixture(scope="module")
def models_by_case(blackmamba_folder):
    config = from_hub_config(json.loads((blackmamba_folder / "config.json").read_text()))

    def load(k, activation):
        wanted = config.replace(experts_per_token=k, activation=activation)
        return load_weights(build(wanted, dtype=jnp.float32), blackmamba_folder, jax.random.key(0))

    return {case: load(*settings) for case, settings in CASES.items()}


@pytest.fixture(scope="module")
def batch(blackmamba_vectors):
    return batch_of(blackmamba_vectors)


@pytest.mark.parametrize("case", CASES)
def test_logits(case, models_by_case, batch, blackmamba_vectors):
    model = models_by_case[case]
    logits = full_logits(model, batch.tokens, batch.segment_ids)
    real = np.asarray(batch.segment_ids) > 0
    np.testing.assert_allclose(np.asarray(logits)[real], blackmamba_vectors[f"{case}/logits"][real], rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("case", "remat"),
    [pytest.param(case, remat, marks=[] if remat == "full" or (case, remat) == ("top2", "none") else pytest.mark.long)
     for case in CASES for remat in ("none", "dots", "full")],
)  # fmt: skip
def test_loss_gradients_and_counts(case, remat, models_by_case, batch, blackmamba_vectors):
    loss, stats, gradients = loss_and_gradients(models_by_case[case], batch, remat=remat)
    np.testing.assert_allclose(loss, blackmamba_vectors[f"{case}/loss"], rtol=1e-5)
    np.testing.assert_array_equal(stats.counts, blackmamba_vectors[f"{case}/counts"])
    for name, ours in hub_arrays(gradients):
        assert_close_to_largest(ours, blackmamba_vectors[f"{case}/grad/{name}"], 2e-5, name)


def test_label_smoothing(models_by_case, batch, blackmamba_vectors):
    loss, _, _ = loss_and_gradients(models_by_case["top2"], batch, label_smoothing=0.1)
    np.testing.assert_allclose(loss, blackmamba_vectors["top2/smooth"], rtol=1e-5)


def test_an_expert_without_tokens_has_exactly_zero_gradient(models_by_case, batch):
    model = models_by_case["top1"]
    one = Batch(*(jnp.broadcast_to(a[:1], a.shape).at[:, 5:].set(0) for a in batch))  # in each row the same five tokens
    _, stats, gradients = loss_and_gradients(model, one)
    idle = np.argwhere(np.asarray(stats.counts) == 0)
    assert len(idle)
    for layer, expert in idle:
        for name in ("w1", "w2", "w3"):
            assert not np.asarray(getattr(gradients.layers.moe, name).weight.get_value())[layer, expert].any()


def test_routing_weights_are_the_sigmoids_themselves(models_by_case):
    """No renormalization, no sinkhorn: the weights of a token do not sum to one, and do not depend on other tokens."""
    moe = nnx.merge(*nnx.split(models_by_case["top2"].layers.moe))
    state = jax.tree.map(lambda a: a[0], nnx.state(moe))
    layer = nnx.merge(nnx.graphdef(moe), state)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(7, 24)), jnp.float32)
    indices, weights, _ = layer._route(x, jnp.ones(7, bool), None)
    sigmoids = 1 / (
        1 + np.exp(-(np.asarray(x) @ np.asarray(layer.router.weight.get_value()).T + layer.router.bias.get_value()))
    )
    np.testing.assert_allclose(weights, np.take_along_axis(sigmoids, np.asarray(indices), 1), rtol=1e-5)
    assert np.all(sigmoids.argmax(1) == np.asarray(indices)[:, 0])
    alone = [layer._route(row[None], jnp.ones(1, bool), None)[1][0] for row in x]
    np.testing.assert_allclose(weights, alone, rtol=1e-5)
    assert abs(float(weights.sum(-1).mean()) - 1) > 0.05


@pytest.mark.parametrize("case", ["top2", pytest.param("dense", marks=pytest.mark.long)])
def test_packed_equals_alone(case, models_by_case, batch):
    """Two queries in one row: hidden states, and the gradients of their sum, as from two rows."""
    model = models_by_case[case]
    graphdef, trainable, frozen = split(model, full=True)
    first, second = np.asarray(batch.tokens[0, :9]), np.asarray(batch.tokens[1, :7])
    packed, packed_segments, alone, alone_segments = np.zeros((4, 2, 17), np.int32)  # one program for both: of rows and a row of padding
    packed[0, :16], packed_segments[0, :16] = np.concatenate([first, second]), [1] * 9 + [2] * 7
    alone[0, :9], alone[1, :7] = first, second
    alone_segments[0, :9] = alone_segments[1, :7] = 1

    def total(trainable, tokens, segments):
        hidden = nnx.merge(graphdef, trainable, frozen)(tokens, segments)[0]
        return jnp.sum(jnp.sin(hidden) * (segments > 0)[..., None]), hidden

    run = jax.jit(jax.value_and_grad(total, has_aux=True))
    (value, hidden), gradient = run(trainable, packed, packed_segments)
    (expected, rows), reference = run(trainable, alone, alone_segments)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(hidden[0, 9:16], rows[1, :7], atol=2e-5)
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(reference), strict=True):
        assert_close_to_largest(ours, theirs, 2e-5, "gradient")


def test_decoding_with_states_equals_the_full_pass(models_by_case, batch):
    """Prompts of different length in one padded batch, then token by token."""
    model, lengths = models_by_case["top2"], np.array([9, 2, 5])
    tokens = np.asarray(batch.tokens)
    full = full_logits(model, tokens, np.ones_like(tokens))
    begin, go_on = decoder(model)
    logits, cache = begin(tokens[:, :9], lengths, init_cache(model, 3, 17))
    for step in range(6):
        np.testing.assert_allclose(logits, full[range(3), lengths + step - 1], rtol=0, atol=1e-5 * np.abs(full).max())
        logits, cache = go_on(tokens[range(3), lengths + step], cache)


def test_counts_to_the_digit():
    for preset, total in (("blackmamba-2.8b", 2_783_213_584), ("blackmamba-1.5b", 1_458_462_072)):
        model = build(PRESETS[preset])
        assert sum(v.get_value().size for _, v in nnx.to_flat_state(nnx.state(model))) == total


def test_a_checkpoint_is_written_as_it_was_read(models_by_case, blackmamba_vectors, tmp_path):
    save_weights(models_by_case["top2"], tmp_path, jnp.float32)
    config = from_hub_config(json.loads((tmp_path / "config.json").read_text()))
    assert config == models_by_case["top2"].config
    again = load_weights(build(config, dtype=jnp.float32), tmp_path, jax.random.key(0))
    for name, array in hub_arrays(again):
        np.testing.assert_array_equal(array, blackmamba_vectors[f"w/{name}"])


def test_frozen_with_adapters_trains_nothing_else():
    config = PRESETS["blackmamba-tiny"]
    model = build(config, quantization=Quantization(), adapter=LoRAConfig(rank=4))
    assert {type(v) for _, v in nnx.to_flat_state(nnx.state(model, nnx.Param))} == {nnx.LoRAParam}
    with pytest.raises(
        ValueError, match=r"'q_proj' does not exist in a BlackMamba: expected some of gate, w1, w2, w3"
    ):
        build(config, adapter=LoRAConfig(targets=("q_proj",)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mamba_moe_layers": ["r", "8", "8", "r"]}, r"mamba_moe_layers\[2\] = '8'.*in turn"),
        ({"mamba_moe_layers": ["8", "r", "8", "r"]}, r"mamba_moe_layers\[0\] = '8'.*beginning with 'r'"),
        ({"mamba_moe_layers": ["r", "8", "r", "4"]}, r"layers of \[4, 8\] experts: expected one number"),
        ({"mamba_moe_layers": ["r", "8"]}, r"2 entries, num_layers = 4"),
        ({"add_bias_linear": True}, "add_bias_linear"),
        ({"swiglu": False}, "swiglu"),
        ({"conv_bias": False, "dt_rank": 64}, r'conv_bias = false \(expected true\), dt_rank = 64 \(expected "auto" or 92\): not known'),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling = "),
        ({"nobody_knows": 3}, "nobody_knows = 3"),
        ({"nobody_knows": 0}, "nobody_knows = 0"),
        ({"mamba_moe_layers": ["r", "8", "r", "16"]}, r"layers of \[8, 16\] experts"),
        ({"eos_token_id": "x"}, 'eos_token_id = "x": expected the number of a token, several, or null'),
        ({"mamba_moe_layers": "r8"}, "expected a list of 'r'"),
        ({"ffn_hidden_size": 1.5}, "ffn_hidden_size = 1.5: expected a whole number"),
        ({"topk": 9}, "experts_per_token = 9 exceeds num_experts = 8"),
        ({"activation": "relu"}, "activation = 'relu': expected 'gelu' or 'silu'"),
    ],
)
def test_bad_configs(change, message):
    config = BlackMambaConfig(num_layers=4).to_hub_config() | change
    with pytest.raises(ValueError, match=message):
        from_hub_config(config)


def test_settings_without_an_effect():
    config = BlackMambaConfig(num_layers=4).to_hub_config()
    others = {"bias": True, "rms_norm": False, "activation_func": "swiglu", "max_sequence_length": 2048, "torch_dtype": "bfloat16"}
    assert from_hub_config(config | others) == from_hub_config(config)


def test_left_padding_and_empty_rows_are_refused(models_by_case):
    model, tokens = models_by_case["top2"], jnp.ones((2, 4), jnp.int32)
    with pytest.raises(ValueError, match=r"row 1 has padding at 0 before a token at 1.*Pad on the right"):
        model(tokens, jnp.asarray([[1, 1, 1, 0], [0, 1, 1, 1]]))
    with pytest.raises(ValueError, match="sequence length is 0"):
        model(tokens[:, :0], tokens[:, :0])
    with pytest.raises(ValueError, match="sequence length is 0"):
        init = init_cache(model, 2, 8)
        model.cached(tokens[:, :0], jnp.ones((2, 0), bool), tokens[:, :0], init.layers)
