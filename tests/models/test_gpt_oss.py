"""What gpt-oss alone has: its files, what they may lack, greedy tokens beyond its window, and attention that flash does not have."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles.drawn import weight
from safetensors.numpy import load_file, save_file
from support import VECTORS, decoder, full_logits, walked_logits

from moejax.errors import UserError
from moejax.hub import merge, servers
from moejax.hub.save import save_weights, stored_shapes
from moejax.hub.weights import load_weights, read_config
from moejax.models.build import build
from moejax.models.cache import init_cache
from moejax.models.config import PRESETS, LoRAConfig, Quantization
from moejax.models.ops import flash
from moejax.models.ops.quantized import quantize
from moejax.training import flops
from moejax.training.experts import attending

SMALL = PRESETS["gpt-oss-tiny"].replace(
    vocab_size=32, hidden_size=32, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, num_experts=4, experts_per_token=2,
    head_dim=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def vectors():
    return dict(np.load(VECTORS / "gpt_oss.npz"))


@pytest.mark.parametrize("row", [0, 1])
def test_greedy_tokens_are_those_of_transformers(vectors, row, tmp_path):
    """Sixteen positions with a window of four in the first layer."""
    (tmp_path / "config.json").write_text(str(vectors["gpt_oss/config"]))
    config = read_config(tmp_path)
    save_file({n: weight(n, s) for n, s in stored_shapes(build(config)).items()}, str(tmp_path / "model.safetensors"))
    model = load_weights(build(config, dtype=jnp.float32), tmp_path, jax.random.key(0))
    length, expected = (7, 3)[row], vectors[f"gpt_oss/generated/{row}"]
    begin, go_on = decoder(model)
    logits, cache = begin(jnp.asarray(vectors["ids"][row : row + 1, :length]), jnp.asarray([length]), init_cache(model, 1, 16))
    found = []
    for _ in expected:
        found.append(int(logits.argmax()))
        logits, cache = go_on(jnp.asarray(found[-1:]), cache)
    np.testing.assert_array_equal(found, expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model with no zero in it, and its folder."""
    folder = tmp_path_factory.mktemp("saved")
    model = build(SMALL, key=jax.random.key(1), dtype=jnp.float32)
    save_file({n: weight(n, s) for n, s in stored_shapes(model).items()}, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(SMALL.to_hub_config()))
    return load_weights(build(SMALL, dtype=jnp.float32, param_dtype=jnp.float32), folder, jax.random.key(0)), folder


def test_files_are_written_as_they_are_read(saved, tmp_path):
    model, folder = saved
    save_weights(model, tmp_path, jnp.float32)
    written, read = (load_file(str(f / "model.safetensors")) for f in (tmp_path, folder))
    assert written.keys() == read.keys() and read_config(tmp_path) == SMALL
    for name, array in read.items():
        np.testing.assert_array_equal(written[name], array)
    gate_up = read["model.layers.1.mlp.experts.gate_up_proj"]  # [experts, in, rows in turn]
    np.testing.assert_array_equal(model.layers.moe.w3.weight.get_value()[1, 2], gate_up[2, :, 1::2].T)
    np.testing.assert_array_equal(model.layers.moe.w1.bias.get_value()[1, 2], read["model.layers.1.mlp.experts.gate_up_proj_bias"][2, ::2])


def test_an_expert_is_quantized_by_itself(saved):
    model, folder = saved
    found = load_weights(build(SMALL, quantization=Quantization(), dtype=jnp.float32), folder, jax.random.key(0))
    for name in ("w1", "w2", "w3"):
        matrix = getattr(model.layers.moe, name).weight.get_value()[1, 2]
        np.testing.assert_array_equal(
            getattr(found.layers.moe, name).weight.get_value().codes[1, 2], quantize("nf4-double", matrix).codes
        )
    assert found.layers.moe.w1.bias.get_value().dtype == jnp.float32 and found.layers.attention.sinks.get_value().shape == (2, 2)


@pytest.mark.parametrize("lost", ["mlp.experts.down_proj_bias", "mlp.router.bias", "self_attn.o_proj.bias", "self_attn.sinks"])
def test_what_a_checkpoint_lacks_is_named(saved, lost, tmp_path):
    _, folder = saved
    name, tensors = f"model.layers.1.{lost}", load_file(str(folder / "model.safetensors"))
    save_file({n: t for n, t in tensors.items() if n != name}, str(tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match=rf"tensor '{name}' is missing"):
        load_weights(build(SMALL), tmp_path, jax.random.key(0))


def test_a_tensor_of_another_shape_is_named(saved, tmp_path):
    _, folder = saved
    tensors = load_file(str(folder / "model.safetensors"))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    save_file(tensors | {name: tensors[name].swapaxes(1, 2).copy()}, str(tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match=rf"tensor '{name}' has shape .*expected \[24, 32\] by its config.json"):
        load_weights(build(SMALL), tmp_path, jax.random.key(0))


def test_experts_in_mxfp4(tmp_path):
    """Blocks and scales in the place of both matrices, rows in turn; biases next to them."""
    config, draw = SMALL.replace(intermediate_size=32), np.random.default_rng(0)
    tensors = {n: weight(n, s) for n, s in stored_shapes(build(config)).items()}
    for name, rows in (("gate_up_proj", 64), ("down_proj", 32)):
        for layer in range(2):
            del tensors[f"model.layers.{layer}.mlp.experts.{name}"]
            blocks, scales = draw.integers(0, 256, (4, rows, 1, 16), np.uint8), draw.integers(118, 124, (4, rows, 1), np.uint8)
            tensors |= {f"model.layers.{layer}.mlp.experts.{name}_{n}": a for n, a in (("blocks", blocks), ("scales", scales))}
    save_file(tensors, str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps(config.to_hub_config() | {"quantization_config": {"quant_method": "mxfp4"}}))
    read = read_config(tmp_path)
    model = load_weights(build(read, dtype=jnp.float32, adapter=LoRAConfig(2)), tmp_path, jax.random.key(0))
    blocks, scales = (tensors[f"model.layers.1.mlp.experts.gate_up_proj_{n}"][2, 1::2, 0] for n in ("blocks", "scales"))
    codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(32, 32)
    numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes & 7] * np.where(codes > 7, -1, 1) * np.exp2(scales[:, None].astype(float) - 127)
    w3 = model.layers.moe.w3
    np.testing.assert_array_equal(w3.weight.get_value().part((1, 2)).dequantize(jnp.float32), numbers)
    np.testing.assert_array_equal(w3.bias.get_value()[1, 2], tensors["model.layers.1.mlp.experts.gate_up_proj_bias"][2, 1::2])


@pytest.mark.parametrize("adapter", [{"targets": ("w1", "w2")}, {"rank": {"attention": 2, "w1": 2, "w2": 2, "w3": 4}}])
def test_gate_and_up_have_one_adapter(adapter):
    with pytest.raises(ValueError, match="of a gpt-oss: its files hold gate_proj and up_proj as one matrix"):
        build(SMALL, adapter=LoRAConfig(**adapter))


def test_flash_has_no_sinks_and_no_windows_on_a_gpu():
    ((head_dim, lacking),) = attending(SMALL)
    assert "has no sinks and no window (here of 16 positions)" in flash.refusal("NVIDIA L4", jnp.bfloat16, 64, lacking)
    assert flash.why_blocks("auto", "NVIDIA L4", jnp.bfloat16, 64, 512, lacking) == lacking
    assert flash.why_blocks("auto", "TPU v5 lite", jnp.bfloat16, 64, 512, lacking) is None  # and on a TPU it has both
    assert head_dim == 16 and {lacking for _, lacking in attending(PRESETS["qwen3-moe-tiny"])} == {None}


def test_flops_of_attention_are_of_the_keys_in_the_window():
    config = SMALL.replace(sliding_window=4)
    counted = flops.count(config, None)
    seen = [sum(min(t + 1, window) for n in (3, 9) for t in range(n)) for window in (4, 99)]  # of the two layers
    assert counted.step(12, [3, 9]) - counted.step(12, []) == 3 * 4 * 2 * 16 * sum(seen)


def test_merged_as_files_hold_it(saved, tmp_path):
    """Base and adapter in the tensors that transformers reads; biases and sinks as they were."""
    _, folder = saved
    model = build(SMALL, dtype=jnp.float32, adapter=LoRAConfig(2, 4.0))
    lora = nnx.state(model, nnx.LoRAParam)
    draw = np.random.default_rng(1)
    nnx.update(model, jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), jnp.float32), lora))
    merge.save_merged(model, folder, tmp_path / "merged")
    merged, base = (load_file(str(f / "model.safetensors")) for f in (tmp_path / "merged", folder))
    assert merged.keys() == base.keys()
    up = model.layers.moe.w3.lora
    added = 2.0 * up.b.get_value()[1, 3] @ up.a.get_value()[1, 3]
    name = "model.layers.1.mlp.experts.gate_up_proj"
    expected = (base[name][3, :, 1::2] + np.asarray(added).T).astype(jnp.bfloat16)
    np.testing.assert_allclose(merged[name][3, :, 1::2].astype(np.float32), expected.astype(np.float32), rtol=2**-7)
    for lasting in ("mlp.experts.down_proj_bias", "self_attn.sinks"):
        name = f"model.layers.0.{lasting}"
        np.testing.assert_array_equal(merged[name], base[name].astype(jnp.bfloat16))


def test_vllm_loads_attention_and_experts():
    """Its largest rank is that of gate_up_proj, which holds two adapters where each has its own A."""
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3")
    for share, rank in ((None, 16), (("w1", "w3"), 8)):
        pairs = servers.as_stored(SMALL, LoRAConfig(8, 16.0, targets=targets, share=share).of(SMALL))
        servers.check(servers.SERVERS["vllm"], SMALL, pairs, ())
        assert f"--max-lora-rank {rank} " in servers.started(servers.SERVERS["vllm"], "base", "adapter", pairs, None)
    with pytest.raises(UserError, match=r"vLLM .* cannot hold adapters on router"):
        servers.check(servers.SERVERS["vllm"], SMALL, LoRAConfig(8, targets=(*targets, "gate")).of(SMALL), ())
    with pytest.raises(UserError, match=r"SGLang .* is not known to load adapters of a gpt-oss"):
        servers.check(servers.SERVERS["sglang"], SMALL, pairs, ())


def test_layer_by_layer(saved):
    """As an export is verified: each layer has its own window."""
    _, folder = saved
    config, tokens = SMALL.replace(sliding_window=4), np.arange(12) * 5 % 32
    (found,) = walked_logits(config, folder, tokens, param_dtype=jnp.float32)
    model = load_weights(build(config, dtype=jnp.float32), folder, jax.random.key(0))
    ones, positions = np.ones((1, 12), np.int32), np.arange(12)[None]
    np.testing.assert_allclose(found, full_logits(model, tokens[None], ones, positions)[0], atol=2e-5)
