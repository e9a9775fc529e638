"""Latent attention, its cache, the bias that experts are chosen by, shared experts and dense layers: DeepSeek-V2-Lite, Moonlight and
GLM-4.7-Flash. What they share with other families is in test_families.py."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from moejax.errors import UserError
from moejax.hub import merge, peft, verification
from moejax.hub.layerwise import Checkpoint
from moejax.hub.save import save_weights
from moejax.hub.weights import load_weights, read_config
from moejax.models.build import build
from moejax.models.cache import init_cache
from moejax.models.config import PRESETS, LoRAConfig, Quantization, from_hub_config
from moejax.models.layers import Frozen
from moejax.models.ops.quantized import QuantizedTensor, quantize
from moejax.training.program import split

TINY = PRESETS["deepseek-v3-tiny"].replace(
    vocab_size=32, hidden_size=32, intermediate_size=16, num_layers=3, num_heads=2, num_kv_heads=2, num_experts=4, experts_per_token=2,
    head_dim=4, qk_nope_head_dim=6, v_head_dim=5, kv_lora_rank=7, dense_size=21,
)  # fmt: skip
TOKENS = np.arange(24, dtype=np.int32) % 31

RELEASED = {  # as the repositories have them
    "moonlight-16b-a3b": {
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "bos_token_id": 163584, "eos_token_id": 163586, "ep_size": 1,
        "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 11264,
        "kv_lora_rank": 512, "max_position_embeddings": 8192, "model_type": "deepseek_v3", "moe_intermediate_size": 1408,
        "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": True,
        "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
        "num_nextn_predict_layers": 0, "pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-05, "rope_theta": 50000.0, "routed_scaling_factor": 2.446, "scoring_func": "sigmoid", "seq_aux": True,
        "tie_word_embeddings": False, "topk_group": 1, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True,
        "transformers_version": "4.46.3", "v_head_dim": 128, "vocab_size": 163840,
    },
    "deepseek-v2-lite": {
        "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"}, "bos_token_id": 100000, "eos_token_id": 100001,
        "first_k_dense_replace": 1, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840, "mlp_bias": False, "model_type": "deepseek_v2",
        "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
        "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
        "pad_token_id": None, "pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06, "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707, "type": "yarn",
            "original_max_position_embeddings": 4096,
        }, "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True, "tie_word_embeddings": False,
        "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128, "vocab_size": 102400,
    },
    "glm-4.7-flash": {
        "architectures": ["Glm4MoeLiteForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "dtype": "bfloat16",
        "eos_token_id": [154820, 154827, 154829], "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 10240, "kv_lora_rank": 512, "max_position_embeddings": 202752, "model_type": "glm4_moe_lite",
        "moe_intermediate_size": 1536, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 1, "norm_topk_prob": True,
        "num_attention_heads": 20, "num_experts_per_tok": 4, "num_hidden_layers": 47, "num_key_value_heads": 20,
        "num_nextn_predict_layers": 1, "pad_token_id": 154820, "partial_rotary_factor": 1.0, "q_lora_rank": 768, "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000, "routed_scaling_factor": 1.8,
        "tie_word_embeddings": False, "topk_group": 1, "topk_method": "noaux_tc", "v_head_dim": 256, "vocab_size": 154880,
    },
}  # fmt: skip


@pytest.mark.parametrize("preset", RELEASED)
def test_a_released_config_is_its_preset(preset):
    config = from_hub_config(RELEASED[preset])
    assert config == PRESETS[preset]
    lacks = {name: value for name, value in RELEASED[preset].items() if name != "q_lora_rank"}
    with pytest.raises(KeyError, match="q_lora_rank"):  # the classes' own default is another model's
        from_hub_config(lacks)


def test_the_biases_of_a_choice_are_no_parameters():
    config = PRESETS["moonlight-16b-a3b"]
    (path,) = config.buffers
    assert config.weights[path] == (26, 64) and config.parameters == (15_960_108_544, 2_914_774_528)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """fp32 weights in the Hub's layout, with biases that decide."""
    folder = tmp_path_factory.mktemp("base")
    model = build(TINY, key=jax.random.key(0), dtype=jnp.float32)
    bias = model.layers.moe.router.choice_bias
    bias.set_value(jax.random.uniform(jax.random.key(1), bias.get_value().shape, minval=-1, maxval=1))
    save_weights(model, folder, jnp.float32)
    return folder


def test_a_bias_decides_and_weighs_nothing(base):
    model = load_weights(build(TINY, dtype=jnp.float32), base, jax.random.key(0))
    moe = nnx.merge(*nnx.split(jax.tree.map(lambda a: a[0], model.layers.moe)))
    x = jax.random.normal(jax.random.key(2), (9, 32))
    indices, weights, _ = moe._route(x, jnp.ones(9, bool), None)
    scores = jax.nn.sigmoid(x @ moe.router.weight.get_value().T)
    expected = jax.lax.top_k(scores + moe.router.choice_bias.get_value(), 2)[1]
    np.testing.assert_array_equal(indices, expected)
    assert not np.array_equal(indices, jax.lax.top_k(scores, 2)[1])
    own = jnp.take_along_axis(scores, expected, 1)
    np.testing.assert_allclose(weights, 2.446 * own / own.sum(1, keepdims=True), rtol=1e-6)


def test_a_bias_is_fp32_and_never_trained(base, tmp_path):
    """In a full fine-tuning too; saved in bf16, the model's biases are as they were to the bit."""
    model = load_weights(build(TINY, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16), base, jax.random.key(0))
    _, trainable, frozen = split(model, full=True)
    assert [path[-1] for path, _ in nnx.to_flat_state(frozen)] == ["choice_bias"]
    assert "choice_bias" not in {path[-1] for path, _ in nnx.to_flat_state(trainable)}
    assert isinstance(model.layers.moe.router.choice_bias, Frozen)
    save_weights(model, tmp_path, jnp.bfloat16)
    name = "model.layers.2.mlp.gate.e_score_correction_bias"
    before, after = (load_file(str(folder / "model.safetensors")) for folder in (base, tmp_path))
    assert after[name].dtype == np.float32
    np.testing.assert_array_equal(after[name], before[name])


def test_a_layer_that_predicts_further_tokens_is_passed_over(base, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("moejax.hub.weights.say", lambda *lines: told.extend(lines))
    held = load_file(str(base / "model.safetensors"))
    more = {"model.layers.3.eh_proj.weight": np.ones((2, 2), np.float32), "model.layers.3.mlp.gate.weight": np.ones((4, 32), np.float32)}
    save_file(held | more, str(tmp_path / "model.safetensors"))
    settings = json.loads((base / "config.json").read_text())
    for predicting in (1, 0):
        (tmp_path / "config.json").write_text(json.dumps(settings | {"num_nextn_predict_layers": predicting}))
        model = build(read_config(tmp_path), dtype=jnp.float32)
        if predicting:
            load_weights(model, tmp_path, jax.random.key(0))
            assert "2 tensors behind the last layer, which predict further tokens, are not read, first model.layers.3.eh_proj" in told[0]
        else:
            with pytest.raises(UserError, match="2 tensors have no place in a DeepSeek-V3 of 3 layers"):
                load_weights(model, tmp_path, jax.random.key(0))


def test_the_cache_holds_latents_alone():
    config = PRESETS["glm-4.7-flash"]
    cache = jax.eval_shape(lambda: init_cache(build(config), 2, 1000))
    assert [held.shape for held in jax.tree.leaves(cache.layers)] == [(1, 2, 1000, 576), (46, 2, 1000, 576)]


def test_what_is_quantized_and_adapted_by_default():
    """Odd sizes too (a dense layer of 21): every matrix of every layer is coded by itself."""
    model = build(TINY, quantization=Quantization(), adapter=LoRAConfig(2))
    coded = {path[:-1] for path, v in nnx.to_flat_state(nnx.state(model)) if isinstance(v.get_value(), QuantizedTensor)}
    assert coded == {path for group in ("attention", "experts", "mlp") for path in TINY.groups[group]}
    assert ("layers", "moe", "shared", "w2") in coded and ("first", "mlp", "w2") in coded and ("layers", "moe", "router") not in coded
    adapted = {path[:-2] for path, _ in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))}
    assert adapted == {path for group in ("attention", "experts") for path in TINY.groups[group]}
    weight = jax.random.normal(jax.random.key(1), (32, 21))
    np.testing.assert_allclose(quantize("nf4", weight).dequantize(jnp.float32), weight, atol=0.6)


class TestAdaptersOfWhatEveryTokenMeets:
    ADAPTER = LoRAConfig({"attention": 2, "mlp": 4}, 4.0, 0.0, ("o_proj", "shared_w1", "shared_experts.down_proj", "mlp.up_proj"))

    def test_names(self, tmp_path):
        """By either name; in PEFT's file the experts' own gate_proj is kept out, and one rank is distinguished from another."""
        config = LoRAConfig({"experts": 2, "mlp": 4, "w2": 3}, 4.0, 0.0, ("w1", "w2", "shared_w1", "shared_w2"))
        peft.save_adapter(build(TINY, key=jax.random.key(0), adapter=config), tmp_path, "org/base")
        settings = json.loads((tmp_path / "adapter_config.json").read_text())
        assert settings["target_modules"] == ["down_proj", "gate_proj", "shared_experts.down_proj", "shared_experts.gate_proj"]
        assert settings["exclude_modules"] == ["mlp.down_proj", "mlp.gate_proj"]
        ranks = {r"experts\.\d+\.down_proj": 3, "shared_experts.down_proj": 4, "shared_experts.gate_proj": 4}
        assert settings["r"] == 2 and settings["rank_pattern"] == ranks
        peft.load_adapter(build(TINY, adapter=config), tmp_path)
        with pytest.raises(UserError, match=r"adapts down_proj, gate_proj, shared_experts\.down_proj.*the model's adapter gate_proj: set"):
            peft.load_adapter(build(TINY, adapter=LoRAConfig(2, 4.0, 0.0, ("w1",))), tmp_path)

    def test_the_fused_format_cannot_hold_them(self, tmp_path):
        with pytest.raises(UserError, match=r"cannot hold the adapters on mlp\.up_proj, shared_experts\.down_proj, .*use --format peft"):
            peft.save_adapter(build(TINY, key=jax.random.key(0), adapter=self.ADAPTER), tmp_path, "org/base", fused=True)

    @pytest.mark.long
    def test_merged_as_trained(self, base, tmp_path):
        """Over NF4: every matrix and, a layer at a time, every choice of the merged model is the trained one's."""
        arguments = {"quantization": Quantization(), "adapter": self.ADAPTER}
        model = build(TINY, **arguments)
        for index, (_, lora) in enumerate(peft.adapted(model).values()):
            lora.a.set_value(jax.random.uniform(jax.random.key(index), lora.a.get_value().shape, minval=-0.2, maxval=0.2))
            lora.b.set_value(0.004 * jax.random.normal(jax.random.key(100 + index), lora.b.get_value().shape))
        peft.save_adapter(model, tmp_path / "adapter", "base")
        merge.save_merged(model, base, tmp_path / "merged")
        trained = Checkpoint(TINY, base, (tmp_path / "adapter",), arguments)
        written = Checkpoint(read_config(tmp_path / "merged"), tmp_path / "merged", (), {"param_dtype": jnp.bfloat16})
        assert verification.compare([trained, written], TOKENS, 0.05).share < 0.05
