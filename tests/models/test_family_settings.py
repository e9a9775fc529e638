"""config.json of the families of attention and experts: what transformers 5.24 writes (tests/oracles/families.py), what is refused, what is
written here."""

import json
import math

import numpy as np
import pytest
from support import VECTORS

from moejax.models.config import FAMILIES, PRESETS, from_hub_config, register
from moejax.models.families.qwen3_moe import Qwen3MoeConfig

SETTINGS = {
    name.removesuffix("/settings"): str(file[name])
    for file in (np.load(VECTORS / f"{name}.npz") for name in ("families", "gpt_oss", "latent"))
    for name in file if name.endswith("/settings")
}  # fmt: skip
"""Family -> its default settings."""


@pytest.mark.parametrize("case", SETTINGS)
def test_what_transformers_writes_is_read(case):
    """The family's default settings in 5.24, in full; and what this writes, by either name of the number of experts."""
    unlike = {"deepseek_v3": {"n_group": 1, "topk_group": 1}, "deepseek_v2": {"num_experts_per_tok": 6}}  # refused; not said
    default = from_hub_config(json.loads(SETTINGS[case]) | unlike.get(case, {}))
    found = default.num_experts, default.experts_per_token, default.renormalizes
    assert found == {
        "qwen3_moe": (128, 8, False), "olmoe": (64, 8, False), "flex_olmo": (7, 5, False), "gpt_oss": (128, 4, True),
        "deepseek_v3": (256, 8, True), "glm4_moe_lite": (64, 4, True), "deepseek_v2": (64, 6, False),
    }[case]  # fmt: skip
    for preset in PRESETS.values():
        if preset.model_type == case:
            written, preset = preset.to_hub_config(), preset.replace(expert_format=None)  # what is written has numbers
            assert from_hub_config(written) == preset
            by_other_name = {"num_experts": preset.num_experts} | {k: v for k, v in written.items() if k != "num_local_experts"}
            assert from_hub_config(by_other_name) == preset
            assert from_hub_config({k: v for k, v in written.items() if k != "num_experts"}) == preset
    if case == "gpt_oss":
        assert default == PRESETS["gpt-oss-120b"].replace(router_aux_loss_coef=0.001, eos_token_id=None, expert_format=None)


REFUSED = {
    "qwen3-moe-tiny": [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, r'rope_scaling.rope_type = "dynamic" \(expected "default" or "yarn"\)'),
        ({"use_sliding_window": True, "sliding_window": 512}, "sliding_window = 512"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]"),
        ({"decoder_sparse_step": 2}, r"decoder_sparse_step = 2 \(expected 1\)"),
        ({"attention_bias": True}, "attention_bias = true"),
        ({"num_experts": 8}, "num_local_experts = 16, num_experts = 8: expected the same"),
        ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size = 64"),
        ({"num_local_experts": None, "num_experts": [16]}, r"num_experts = \[16\]: expected a whole number"),
        ({"rope_parameters": {"rope_theta": 5e5}}, r"rope_theta = 10000.0, rope_parameters.rope_theta = 500000.0: expected the same"),
        ({"num_hidden_layers": 10**30}, "expected a whole number below 2,147,483,648"),
        ({"bos_token_id": [1]}, r"bos_token_id = \[1\]: expected the number of a token, or null"),
        ({"router_aux_loss_coef": math.nan}, "router_aux_loss_coef = nan: expected 0 or a number above it"),
    ],
    "olmoe-tiny": [
        ({"clip_qkv": 8.0}, r"clip_qkv = 8\.0"),
        ({"attention_bias": True}, "attention_bias = true"),
        ({"sliding_window": 64}, "sliding_window = 64"),
    ],
    "gpt-oss-tiny": [
        ({"layer_types": ["full_attention"] * 3}, "layer_types = "),
        ({"layer_types": ["full_attention", "chunked_attention"] * 2}, "layer_types = "),
        ({"attention_bias": False}, r"attention_bias = false \(expected true\)"),
        ({"experts_per_token": 4}, "num_experts_per_tok = 2, experts_per_token = 4: expected the same"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"sliding_window": 0}, "sliding_window = 0: expected at least 1"),
        ({"swiglu_limit": "7"}, 'swiglu_limit = "7": expected a number'),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    ],
    "flex-olmo-tiny": [({"clip_qkv": 8.0}, r"clip_qkv = 8\.0"), ({"sliding_window": 64}, "sliding_window = 64")],
    "deepseek-v3-tiny": [
        ({"n_group": 8, "topk_group": 4}, r"n_group = 8 \(expected 1\), topk_group = 4 \(expected 1\)"),
        ({"scoring_func": "softmax"}, r'scoring_func = "softmax" \(expected "sigmoid"\)'),
        ({"topk_method": "greedy"}, r'topk_method = "greedy" \(expected "noaux_tc"\)'),
        ({"rope_interleave": "no"}, r'rope_interleave = "no" \(expected false or true\)'),
        ({"moe_layer_freq": 2}, r"moe_layer_freq = 2 \(expected 1\)"),
        ({"num_key_value_heads": 2}, "num_key_value_heads = 2: expected num_attention_heads = 4"),
        ({"first_k_dense_replace": 4}, "dense_layers = 4: expected less than num_layers = 4"),
        ({"routed_scaling_factor": 0.0}, r"routed_scaling_factor = 0\.0: expected a number above 0"),
        ({"attention_bias": True}, "attention_bias = true"),
        ({"num_experts": 8}, "n_routed_experts = 16, num_experts = 8: expected the same"),
    ],
    "glm4-moe-lite-tiny": [
        ({"mlp_layer_types": ["dense", "sparse", "dense", "sparse"]}, "mlp_layer_types, first_k_dense_replace = 1: expected 4 layers"),
        ({"first_k_dense_replace": 2}, "mlp_layer_types, first_k_dense_replace = 2: expected 4 layers"),
    ],
    "deepseek-v2-tiny": [
        ({"topk_method": "group_limited_greedy"}, r'topk_method = "group_limited_greedy" \(expected "greedy"\)'),
        ({"norm_topk_prob": True}, r"norm_topk_prob = true \(expected false\)"),
        ({"mlp_bias": True}, "mlp_bias = true"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("preset", "change", "message"), [(p, *rest) for p, several in REFUSED.items() for rest in several])
def test_what_is_not_computed_is_refused(preset, change, message):
    with pytest.raises(ValueError, match=message):
        from_hub_config(PRESETS[preset].to_hub_config() | change)


def test_a_window_that_is_not_used_is_none():
    written = PRESETS["qwen3-moe-tiny"].to_hub_config()
    assert from_hub_config(written | {"sliding_window": 64, "max_window_layers": 4}) == PRESETS["qwen3-moe-tiny"]


@pytest.mark.parametrize(
    ("model_type", "message"),
    [("qwen3_5_moe", "Qwen3.5 is not here yet; expected one of .*gpt_oss"),
     ("gemma4_text", "Gemma 4 is not here yet"), ("llama", "'llama': expected one of mixtral")],
)  # fmt: skip
def test_other_families_are_named(model_type, message):
    with pytest.raises(ValueError, match=message):
        from_hub_config({"model_type": model_type})


def test_a_family_from_outside():
    class Mine(Qwen3MoeConfig):
        model_type = "mine"

        @classmethod
        def presets(cls):
            return {"mine-tiny": cls(num_layers=1)}

    try:
        register(Mine)
        assert type(from_hub_config(PRESETS["mine-tiny"].to_hub_config())) is Mine
        with pytest.raises(ValueError, match="'mine' is the name of another family"):
            register(Mine)
    finally:
        FAMILIES.pop("mine", None)
        PRESETS.pop("mine-tiny", None)
