"""What parity with PyTorch does not show: packing, frozen storage, abstract models, scopes."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import VECTORS

from moejax.data.batching import assemble
from moejax.data.tokenize import Query
from moejax.models.build import build, random_weights
from moejax.models.config import PRESETS, LoRAConfig, Quantization, from_hub_config
from moejax.training.program import TrainProgram, split
from moejax.training.step import Objective, sums

SMALL = PRESETS["mixtral-tiny"].replace(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=1
)
SCOPES = (
    "embed", "norm", "attention", "attention/dequant", "moe/router", "moe/topk", "moe/dispatch", "moe/w1_dequant", "moe/w1",
    "moe/w3_dequant", "moe/w3", "moe/act", "moe/w2_dequant", "moe/w2", "moe/combine", "lora", "loss", "optimizer",
)  # fmt: skip


def wider(weight):
    """Weights four times as wide as at the start: attention that crossed a border would show. Norms stay."""
    return 4 * weight if weight.std() > 0 else weight


@pytest.mark.parametrize("k", [2, pytest.param(8, marks=pytest.mark.long)])
def test_packed_equals_alone(k):
    """The same queries in one row, and each in a row of its own: the same loss and gradients."""
    rng = np.random.default_rng(0)
    queries = [Query.after(3, rng.integers(0, 64, n).astype(np.int32)) for n in (9, 14, 5, 4)]
    model = build(SMALL.replace(experts_per_token=k), key=jax.random.key(0), dtype=jnp.float32)
    model = nnx.merge(nnx.split(model)[0], jax.tree.map(wider, nnx.split(model)[1]))
    graphdef, trainable, frozen = split(model, full=True)
    loss = jax.jit(jax.value_and_grad(lambda t, batch: sums(Objective(graphdef, full=True), t, frozen, batch, None)[0]))
    packed = loss(trainable, assemble([queries], 4, 40))  # and rows of padding: one program for both
    alone = loss(trainable, assemble([[q] for q in queries], 4, 40))
    np.testing.assert_allclose(packed[0], alone[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max())), packed[1], alone[1])


def test_long_rows_are_attended_in_blocks_exactly():
    from moejax.models.ops import attention

    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 1024, h, 8)), jnp.float32) for h in (4, 2, 2))
    segments = jnp.asarray(np.sort(rng.integers(1, 5, (1, 1024))), jnp.int32)
    mask = (segments[:, :, None] == segments[:, None, :]) & jnp.tril(jnp.ones((1024, 1024), bool))[None]
    expected = jax.jit(attention.masked_attention)(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)
    np.testing.assert_allclose(jax.jit(attention.segment_attention)(q, k, v, segments), expected, atol=1e-6)


def test_only_the_adapter_is_trainable_and_the_rest_is_codes():
    model = build(SMALL, key=jax.random.key(0), quantization=Quantization(), adapter=LoRAConfig(rank=2))
    _, trainable, frozen = split(model, full=False)
    names = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(trainable)}
    assert names == {f"layers/moe/{m}/lora/{x}" for m in ("router", "w1", "w2", "w3") for x in "ab"}
    floats = [a for a in jax.tree.leaves(frozen) if jnp.issubdtype(a.dtype, jnp.floating) and a.ndim > 1 and a.size > 64 * 64]
    assert all(a.dtype == jnp.bfloat16 for a in floats)


def test_abstract_model_has_the_shapes_of_the_real_one():
    arguments = dict(quantization=Quantization(), adapter=LoRAConfig(rank=2, targets=("w1", "q_proj", "gate")))
    abstract, real = build(SMALL, **arguments), build(SMALL, key=jax.random.key(0), **arguments)
    shapes = [jax.tree.map(lambda a: (a.shape, a.dtype), nnx.to_pure_dict(nnx.state(m))) for m in (abstract, real)]
    assert shapes[0] == shapes[1]
    filled = random_weights(abstract, jax.random.key(1))
    lora = filled.layers.attention.q_proj.lora
    assert not lora.b.get_value().any() and lora.a.get_value().all()
    assert jax.tree.map(lambda a: (a.shape, a.dtype), nnx.to_pure_dict(nnx.state(filled))) == shapes[1]


def test_counts_of_the_full_model():
    model = build(PRESETS["mixtral-8x7b"], adapter=LoRAConfig(), dtype=jnp.bfloat16)
    _, trainable, frozen = split(model, full=False)
    assert sum(a.size for a in jax.tree.leaves(trainable)) == 228_593_664
    assert sum(a.size for a in jax.tree.leaves(frozen)) == 46_702_792_704


def test_scopes_are_in_the_compiled_step(tmp_path):
    """The names that the profile reads back: a renamed scope is a broken contract."""
    from moejax.config import Experiment

    experiment = Experiment.model_validate(
        {
            "name": "x",
            "model": {"preset": "mixtral-tiny"},
            "quantization": {"format": "nf4"},
            "adapter": {},
            "data": {"batching": "fixed", "row_tokens": 32},
            "training": {"steps": 1, "compute_dtype": "float32"},
        }
    )
    text = TrainProgram(experiment, SMALL).compile(2, 32).executable.as_text()
    names = set(re.findall(r'op_name="([^"]*)"', text))
    paths = [[re.sub(r"^(?:\w+\()*|\)*$", "", part) for part in name.split("/")] for name in names]

    def occurs(scope):
        """Whether some path holds the scope's parts in this order; JAX puts its own (`while`, `body`, …) between them."""
        return any(all(part in rest for part in scope.split("/")) for rest in map(iter, paths))

    assert not [scope for scope in SCOPES if not occurs(scope)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type = 'llama'"),
        ({"sliding_window": 512}, "sliding_window = 512"),
        ({"hidden_act": "gelu"}, r'hidden_act = "gelu" \(expected "silu" or "swish"\)'),
        ({"num_experts_per_tok": 9}, "experts_per_token = 9 exceeds num_experts = 8"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, 'rope_parameters.rope_type = "yarn" lacks factor'),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r'rope_scaling.type = "dynamic" .*, rope_scaling.factor = 2\.0'),
        ({"rope_scaling": {"factor": 2.0}}, r"rope_scaling.factor = 2\.0"),
        ({"rope_scaling": "yarn"}, r'rope_scaling = "yarn" \(expected names and values\)'),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        (
            {"router_jitter_noise": 0.1, "attention_dropout": 0.5},
            r"has attention_dropout = 0\.5 \(expected 0\), router_jitter_noise = 0\.1 \(expected 0\): not known to be computed here, .* "
            r"model\.ignored_settings=\[attention_dropout,router_jitter_noise\]",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types = "),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r'quant_method = "gptq" .*, quantization_config.bits = 4'),
        ({"auto_map": {"AutoModelForCausalLM": "mine.Mine"}}, "auto_map = "),
        ({"tie_word_embeddings": "false"}, 'tie_word_embeddings = "false"'),
        ({"norm_topk_prob": False}, r"norm_topk_prob = false \(expected true\)"),
        ({"nobody_knows": {"this": [1]}}, r'nobody_knows = \{"this": \[1\]\}: not known to be computed'),
        ({"hidden_size": "128"}, 'hidden_size = "128": expected a whole number'),
        ({"rope_theta": "1e6"}, 'rope_theta = "1e6": expected a number'),
        ({"rope_theta": 10**400}, r"rope_theta = 1000.*: expected a number up to 1\.8e\+308"),
        ({"rope_theta": -1}, "rope_theta = -1.0: expected a number above 0"),
        ({"rms_norm_eps": 0}, "rms_norm_eps = 0: expected a number above 0"),
    ],
)
def test_configs_that_would_compute_something_else_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_hub_config(PRESETS["mixtral-tiny"].to_hub_config() | change)


def test_every_setting_that_transformers_writes():
    """Those of a default MixtralConfig in transformers 4.57.6 and 5.24.0 (tests/oracles/mixtral_settings.py), and others'."""
    files = json.loads((VECTORS / "mixtral_settings.json").read_text())
    others = {
        "_name_or_path": "org/name", "unsloth_version": "2025.1", "pretraining_tp": 1, "nobody_knows": False, "use_new": None,
        "eos_token_id": [2, 7], "top_k": 20, "sliding_window": 131072, "layer_types": ["full_attention"] * 32,
    }  # fmt: skip
    for settings in files.values():
        expected = PRESETS["mixtral-8x7b"].replace(max_position_embeddings=131072, router_aux_loss_coef=0.001)
        assert from_hub_config(settings) == expected
        again = from_hub_config(settings | others)
        assert again == expected.replace(eos_token_id=(2, 7)) and again.to_hub_config()["eos_token_id"] == [2, 7]
        assert from_hub_config(settings | {"use_new": 1}, ["use_new"]) == expected
    named = files["5.24.0"] | {"num_experts": 4}
    del named["num_local_experts"]
    assert from_hub_config(named).num_experts == 4


def test_both_config_dialects():
    four = PRESETS["mixtral-8x7b"].to_hub_config()
    five = {k: v for k, v in four.items() if k != "rope_theta"} | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}
    }
    assert from_hub_config(four) == from_hub_config(five) == PRESETS["mixtral-8x7b"]
