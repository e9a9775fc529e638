"""Checkpoints that bitsandbytes quantized: read as they are, or refused with what they are."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.load_bitsandbytes import CASES, load, logit_difference, stored_otherwise
from safetensors.numpy import load_file, save_file
from support import VECTORS

from moejax.errors import UserError
from moejax.hub import merge, stored, weights
from moejax.models.build import build
from moejax.models.config import LoRAConfig, Quantization
from moejax.models.ops import nf4

FOLDER = VECTORS / "bitsandbytes"
W1 = "model.layers.1.block_sparse_moe.experts.0.w1.weight"
GATE = "model.layers.1.block_sparse_moe.gate.weight"
STATE = ".quant_state.bitsandbytes__nf4"


@pytest.fixture
def folder(tmp_path):
    """`double` in one file, to be changed."""
    tensors = {name: value for path in (FOLDER / "double").glob("*.safetensors") for name, value in load_file(str(path)).items()}
    save_file(tensors, str(tmp_path / "model.safetensors"))
    shutil.copy(FOLDER / "double" / "config.json", tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", CASES)
def test_codes_are_untouched_and_mean_what_pytorch_makes_of_them(case):
    model = load(FOLDER / case, CASES[case])
    assert stored_otherwise(model, FOLDER / case) == []
    difference, largest = logit_difference(model, FOLDER / case)
    assert largest > 1 and difference < 1e-5 * largest


def test_a_matrix_keeps_its_own_offset():
    model = load(FOLDER / "double", CASES["double"])
    states = {
        name: json.loads(value.tobytes())
        for path in (FOLDER / "double").glob("*.safetensors")
        for name, value in load_file(str(path)).items()
        if name.endswith(STATE)
    }
    offsets = model.layers.moe.w3.weight.get_value().offset
    for layer in range(2):
        for expert in range(2):
            state = states[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight{STATE}"]
            assert offsets[layer, expert] == np.float32(state["nested_offset"])
    assert len(np.unique(offsets)) == 4


def test_nothing_is_quantized_again_or_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(nf4, "encode", None)
    sizes = weights.read_config(FOLDER / "double")
    model = build(sizes, quantization=Quantization(), dtype=jnp.float32)
    weights.load_weights(model, FOLDER / "double", jax.random.key(0), cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_merging_starts_from_the_codes():
    sizes = weights.read_config(FOLDER / "double")
    model = build(sizes, quantization=Quantization(), adapter=LoRAConfig(rank=2, targets=("q_proj",)))
    loaded = load(FOLDER / "double", Quantization()).layers.moe.w1.weight.get_value()
    with weights.ExitStack() as stack:
        files = stored.open_tensors(FOLDER / "double", stack, sizes)
        merged = merge.merged_tensor(model, W1, files, FOLDER / "double")
    np.testing.assert_array_equal(merged, loaded.dequantize(jnp.float32)[1, 0])


@pytest.mark.parametrize(
    ("case", "quantization", "message"),
    [
        ("double", Quantization(double=False), r"00001-of.*0\.self_attn\.q_proj\.weight' has 8-bit scales: set quantization\.double=true"),
        ("single", Quantization(), r"q_proj\.weight' has fp32 scales: set quantization\.double=false"),
        ("unquantized_router", Quantization(), r"gate\.weight' is not quantized.*leave router out of quantization\.modules"),
        ("double", None, r"is quantized to NF4.*set quantization\.format=nf4 and quantization\.modules with attention"),
        ("double", Quantization(modules=("attention", "router")), r"experts\.0\.w1\.weight' is quantized.*modules with experts"),
    ],
)
def test_a_config_that_would_store_it_otherwise(case, quantization, message):
    with pytest.raises(UserError, match=message):
        load(FOLDER / case, quantization)


def with_state(tensors, name=W1, **changes):
    state = json.loads(tensors[name + STATE].tobytes()) | changes
    tensors[name + STATE] = np.frombuffer(json.dumps(state).encode(), np.uint8)


def as_fp4(tensors):
    tensors[W1 + STATE.replace("nf4", "fp4")] = tensors.pop(W1 + STATE)


def as_int8(tensors):
    for name in [n for n in tensors if n.startswith(W1)]:
        del tensors[name]
    tensors[W1] = np.zeros((320, 64), np.int8)
    tensors[W1.replace("weight", "SCB")] = np.ones(320, np.float32)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (as_fp4, rf"model\.safetensors: tensor '{W1}' is fp4.*read here are nf4 codes in blocks of 64"),
        (as_int8, rf"model\.safetensors: tensor '{W1}' is int8.*read here are nf4 codes"),
        (lambda t: with_state(t, quant_type="fp4"), r"w1\.weight' has quant_type = 'fp4': read here"),
        (lambda t: with_state(t, blocksize=128), r"w1\.weight' has blocksize = 128: read here are nf4 codes in blocks of 64"),
        (lambda t: with_state(t, nested_blocksize=64), r"w1\.weight' has nested_blocksize = 64: read here"),
        (lambda t: with_state(t, nested_offset=None), r"w1\.weight' has nested_offset = None"),
        (lambda t: with_state(t, nested_offset="0.1x"), r"w1\.weight' has nested_offset = '0\.1x'"),
        (lambda t: with_state(t, shape=[64, 320]), r"w1\.weight' has shape \[64, 320\], expected \[320, 64\]"),
        (lambda t: with_state(t, shape="x"), r"w1\.weight' is of shape 'x'"),
        (lambda t: t.update({W1 + STATE: np.frombuffer(b"{", np.uint8)}), r"w1\.weight' has a quant_state that is no JSON"),
        (lambda t: t.update({W1 + STATE: np.frombuffer(b"[]", np.uint8)}), r"w1\.weight' has a quant_state that is a list"),
        (lambda t: t.update({W1: t[W1][:-1].copy()}), r"w1\.weight' has 10239 bytes of codes, expected 10240"),
        (lambda t: t.pop(W1), rf"tensor '{W1}' is missing, its quant_state is there"),
        (lambda t: t.pop(W1 + STATE), rf"tensor '{W1}\..*' belongs to a quantized matrix, and '{W1}{STATE}' is missing"),
        (lambda t: t.pop(W1 + ".absmax"), rf"tensor '{W1}\.absmax' is missing"),
        (lambda t: t[W1 + ".nested_absmax"].fill(np.nan), rf"tensor '{W1}\.nested_absmax' holds NaN"),
        (lambda t: t.update({W1 + ".absmax": t[W1 + ".absmax"][1:].copy()}), r"absmax' holds 319 numbers of uint8, expected 320"),
        (lambda t: t[W1 + ".quant_map"].fill(0), r"w1\.weight' has another quant_map than bitsandbytes' own"),
        (lambda t: t[W1 + ".nested_quant_map"].fill(0), r"w1\.weight' has another nested_quant_map"),
    ],
)
def test_what_is_refused(edit, message, folder):
    path = str(folder / "model.safetensors")
    tensors = {name: value.copy() for name, value in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)
    with pytest.raises(UserError, match=message):
        load(folder, Quantization())
