"""GGUF files: what llama.cpp reads of a model, and the same numbers read back."""

import gguf
import ml_dtypes
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.hub import gguf_file
from moejax.hub.names import tensors
from moejax.models.config import PRESETS, from_hub_config

SIZES = {"num_layers": 2, "vocab_size": 40, "hidden_size": 64, "intermediate_size": 48, "num_experts": 4, "experts_per_token": 2}
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 24}
CONFIGS = {
    "mixtral": PRESETS["mixtral-tiny"].replace(**SIZES, **HEADS, rms_norm_eps=1e-6),
    "qwen3_moe": PRESETS["qwen3-moe-tiny"].replace(**SIZES, **HEADS),
    "olmoe": PRESETS["olmoe-tiny"].replace(**SIZES, num_heads=4, num_kv_heads=4, head_dim=16),
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
NAMES = {"mixtral": "llama", "qwen3_moe": "qwen3moe", "olmoe": "olmoe"}


def weights(config):
    """A number generator's tensor for every one of the Hub's."""
    draw, shapes = np.random.default_rng(3), {}
    for name, (place,) in tensors(config).items():
        leading = (place.layer is not None) + (place.expert is not None)
        shapes[name] = config.weights[(*place.path, place.attr)][leading:]
    return {name: draw.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def written(path, config, kind, values=None, **more):
    values = weights(config) if values is None else values
    gguf_file.write(path, config, kind, values.__getitem__, {"general.name": "a name", "tokenizer.ggml.model": "none"} | more)
    reader = gguf.GGUFReader(path)
    return values, {t.name: t for t in reader.tensors}, {name: field.contents() for name, field in reader.fields.items()}


def rounded(value, kind):
    return value.astype({"f16": np.float16, "bf16": ml_dtypes.bfloat16}[kind]).astype(np.float32)


@pytest.mark.parametrize("family", CONFIGS)
def test_names_shapes_and_metadata(family, tmp_path):
    config, name = CONFIGS[family], NAMES[family]
    _, found, keys = written(tmp_path / "m.gguf", config, "f16")
    block = {"attn_norm", "attn_q", "attn_k", "attn_v", "attn_output"}
    block |= {"ffn_norm", "ffn_gate_inp", "ffn_gate_exps", "ffn_down_exps", "ffn_up_exps"}
    block |= set() if family == "mixtral" else {"attn_q_norm", "attn_k_norm"}
    blocks = {f"blk.{layer}.{part}.weight" for layer in range(2) for part in block}
    assert found.keys() == blocks | {"token_embd.weight", "output_norm.weight", "output.weight"}
    shapes = {"ffn_gate_exps": [64, 48, 4], "ffn_down_exps": [48, 64, 4], "ffn_gate_inp": [64, 4]}
    shapes["attn_k"] = [64, config.num_kv_heads * config.head_dim]
    assert {part: found[f"blk.1.{part}.weight"].shape.tolist() for part in shapes} == shapes  # ggml's order: columns first
    in_fp32 = {name.split(".")[-2] for name, tensor in found.items() if tensor.tensor_type == gguf.GGMLQuantizationType.F32}
    assert in_fp32 == {part for part in block if part.endswith("norm")} | {"ffn_gate_inp", "output_norm"}
    expected = {
        "block_count": 2, "context_length": 2048, "embedding_length": 64, "feed_forward_length": 48, "expert_count": 4,
        "expert_used_count": 2,
        "attention.head_count": 4, "attention.head_count_kv": config.num_kv_heads, "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim, "rope.dimension_count": config.head_dim, "rope.freq_base": 1e4, "vocab_size": 40,
        "expert_feed_forward_length": 48, "attention.layer_norm_rms_epsilon": np.float32(config.rms_norm_eps),
    }  # fmt: skip
    assert {key: keys[f"{name}.{key}"] for key in expected} == expected
    assert (keys["general.architecture"], keys["general.name"], keys["general.file_type"]) == (name, "a name", 1)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_values(family, kind, tmp_path):
    config = CONFIGS[family]
    values, found, _ = written(tmp_path / "m.gguf", config, kind)

    def read(name):
        return gguf.quants.dequantize(found[name].data, found[name].tensor_type)

    module, (w1, w2, w3) = config.module, config.matrices
    for own, matrix in (("gate", w1), ("down", w2), ("up", w3)):
        experts = [values[f"model.layers.1.{module}.experts.{e}.{matrix}.weight"] for e in range(4)]
        np.testing.assert_array_equal(read(f"blk.1.ffn_{own}_exps.weight"), rounded(np.stack(experts), kind))
    np.testing.assert_array_equal(read("blk.1.ffn_gate_inp.weight"), values[f"model.layers.1.{module}.gate.weight"])
    np.testing.assert_array_equal(read("blk.0.attn_v.weight"), rounded(values["model.layers.0.self_attn.v_proj.weight"], kind))
    key, width = rounded(values["model.layers.0.self_attn.k_proj.weight"], kind), config.head_dim
    if family == "mixtral":  # llama.cpp turns neighbours there: row i of a head's first half, then row i of its second
        rows = [head * width + half * width // 2 + i for head in range(2) for i in range(width // 2) for half in range(2)]
        key = key[rows]
    np.testing.assert_array_equal(read("blk.0.attn_k.weight"), key)


def test_q8_0(tmp_path):
    """Blocks of 32 with a scale of their own; a row that is no whole number of blocks (w2's 48 columns) is f16."""
    values, found, keys = written(tmp_path / "m.gguf", CONFIGS["qwen3_moe"], "q8_0")
    value, tensor = values["model.layers.0.self_attn.v_proj.weight"], found["blk.0.attn_v.weight"]
    assert (tensor.tensor_type, keys["general.file_type"]) == (gguf.GGMLQuantizationType.Q8_0, 7)
    steps = np.abs(value.reshape(-1, 32)).max(1, keepdims=True) / 127
    off = np.abs(gguf.quants.dequantize(tensor.data, tensor.tensor_type) - value).reshape(-1, 32)
    assert (off <= steps * (0.5 + 127 / 2048)).all() and off.max() > 0
    assert found["blk.0.ffn_down_exps.weight"].tensor_type == gguf.GGMLQuantizationType.F16


@pytest.mark.parametrize("family", CONFIGS)
def test_read_back_under_the_hubs_names(family, tmp_path):
    config, path = CONFIGS[family], tmp_path / "m.gguf"
    values, _, _ = written(path, config, "bf16")
    assert gguf_file.read_sizes(path, config.replace(num_layers=1, rope_theta=5.0)) == config
    found = gguf_file.open_tensors(path, config, "bf16")
    assert found.keys() == values.keys()
    for name, source in found.items():
        kept = values[name] if source.dtype == np.float32 else rounded(values[name], "bf16")
        np.testing.assert_array_equal(source.read().astype(np.float32), kept, err_msg=name)


def test_one_tensor_for_embedding_and_head(tmp_path):
    """llama.cpp takes the embedding for a head that is not there, but for an OLMoE's."""
    for family, has in (("mixtral", False), ("olmoe", True)):
        config = CONFIGS[family].replace(tie_word_embeddings=True)
        values, found, _ = written(tmp_path / f"{family}.gguf", config, "f16")
        assert ("output.weight" in found) == has
        if has:
            np.testing.assert_array_equal(found["output.weight"].data, values["model.embed_tokens.weight"].astype(np.float16))


def test_what_llama_cpp_does_not_compute():
    def refused(config, match, kind="f16"):
        with pytest.raises(UserError, match=match):
            gguf_file.check(config, kind)

    refused(PRESETS["flex-olmo-tiny"], "a FlexOlmo is not written as GGUF: Mixtral, Qwen3-MoE, OLMoE are")
    refused(next(c for name, c in PRESETS.items() if "mamba" in name), "a BlackMamba is not written as GGUF")
    refused(CONFIGS["mixtral"], "--type q4_k_m: expected one of f16, bf16, q8_0", "q4_k_m")
    otherwise = "norm_topk_prob is false here, and llama.cpp computes every Qwen3-MoE with true"
    refused(CONFIGS["qwen3_moe"].replace(norm_topk_prob=False), otherwise)
    refused(CONFIGS["olmoe"].replace(norm_topk_prob=True), "norm_topk_prob is true here")
    refused(CONFIGS["olmoe"].replace(num_kv_heads=2), "as wide as the model, 64; here they are 32, 64 wide")
    scaled = from_hub_config(CONFIGS["qwen3_moe"].to_hub_config() | {"rope_scaling": YARN})
    refused(scaled, "the base's rotary positions are scaled")
    for config in CONFIGS.values():
        gguf_file.check(config, "q8_0")


def test_a_number_beyond_f16(tmp_path):
    config = CONFIGS["mixtral"]
    values = weights(config)
    values["lm_head.weight"][3, 5] = -7e4
    with pytest.raises(UserError, match=r"'lm_head.weight' holds 70000, and f16 ends at 65504: use --type bf16"):
        written(tmp_path / "m.gguf", config, "f16", values)
    assert list(tmp_path.iterdir()) == []
    written(tmp_path / "m.gguf", config, "bf16", values)


def test_memory_holds_a_tensor_at_a_time(tmp_path):
    """Each is asked for when its place in the file is reached, an expert by itself."""
    config, path = CONFIGS["mixtral"], tmp_path / "m.gguf"
    values, sizes = weights(config), []

    def value(name):
        sizes.append(next(tmp_path.iterdir()).stat().st_size)
        return values[name]

    gguf_file.write(path, config, "f16", value, {})
    assert len(sizes) == len(values) and sizes == sorted(sizes) and len(set(sizes)) > 1
    assert sum(t.n_bytes for t in gguf.GGUFReader(path).tensors) == gguf_file.file_bytes(config, "f16")
