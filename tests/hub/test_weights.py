"""Checkpoints in Hub layout: read, quantized, written, refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from support import save_torch

from moejax import hub
from moejax.config import Experiment
from moejax.errors import UserError
from moejax.hub.peft import load_adapter, read_adapter_config, save_adapter
from moejax.hub.save import save_weights
from moejax.hub.stored import weight_files
from moejax.hub.weights import load_weights, read_config, resolve
from moejax.models.build import build
from moejax.models.config import PRESETS, LoRAConfig, Quantization

CONFIG = PRESETS["mixtral-tiny"].replace(
    vocab_size=32, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, num_experts=4
)


def arrays(model):
    return dict(jax.tree_util.tree_leaves_with_path(nnx.split(model)[1]))


def assert_same(a, b):
    left, right = arrays(a), arrays(b)
    assert left.keys() == right.keys()
    for path in left:
        np.testing.assert_array_equal(left[path], right[path], err_msg=str(path))


@pytest.fixture
def folder(tmp_path):
    save_weights(build(CONFIG, key=jax.random.key(0)), tmp_path / "model", jnp.float32)
    return tmp_path / "model"


def test_hub_load_is_the_model_that_a_config_trains(folder):
    """Its weights in NF4 with the config's adapter, whatever source the config itself names."""
    sections = {"model": {"source": "not/there"}, "quantization": {"format": "nf4"}, "adapter": {"rank": 2, "targets": ["w1", "gate"]}}
    data, training = {"source": "d.json", "max_length": 16, "row_tokens": 16}, {"steps": 1, "compute_dtype": "float32"}
    config = Experiment.model_validate(sections | {"name": "x", "seed": 3, "data": data, "training": training})
    quantized = {"quantization": Quantization(True), "adapter": LoRAConfig(2, 32.0, 0.0, ("w1", "gate"))}
    expected = load_weights(build(CONFIG, dtype=jnp.float32, param_dtype=jnp.float32, **quantized), folder, jax.random.key(3))
    assert_same(hub.load(str(folder), config), expected)
    with pytest.raises(UserError, match=r"elsewhere.: no such folder"):
        hub.load(str(folder / "elsewhere"), config)


def test_hub_load_continues_from_an_adapter(folder, tmp_path):
    """What adapter.init_from names, or an error: never a fresh adapter in its place."""
    trained = build(CONFIG, key=jax.random.key(0), adapter=LoRAConfig(2, 8.0, 0.0, ("w1", "gate")))
    for variable in (trained.layers.moe.w1.lora.b, trained.layers.moe.router.lora.b):
        variable.set_value(jax.random.normal(jax.random.key(5), variable.get_value().shape))
    save_adapter(trained, tmp_path / "adapter", "org/model")  # the folder's name

    def config(**changes):
        adapter = {"rank": 2, "alpha": 8.0, "targets": ["w1", "gate"], "init_from": str(tmp_path / "adapter")} | changes
        data, training = {"source": "d.json", "max_length": 16, "row_tokens": 16}, {"steps": 1, "compute_dtype": "float32"}
        sections = {"model": {"source": "not/there"}, "quantization": {"format": "nf4"}, "adapter": adapter}
        return Experiment.model_validate(sections | {"name": "x", "data": data, "training": training})

    model = hub.load(str(folder), config())
    for ours, theirs in ((model.layers.moe.w1, trained.layers.moe.w1), (model.layers.moe.router, trained.layers.moe.router)):
        np.testing.assert_array_equal(ours.lora.a.get_value(), theirs.lora.a.get_value())
        np.testing.assert_array_equal(ours.lora.b.get_value(), theirs.lora.b.get_value())
    (folder / "model.safetensors").unlink()  # an adapter that does not fit is reported before weights are read
    for changes, message in (
        ({"rank": 4}, r"rank 2, alpha 8.*the model's adapter has rank 4.*set adapter\.rank"),
        ({"targets": ["w1"]}, r"adapts gate, w1; the model's adapter w1: set adapter\.targets"),
        ({"init_from": "./nowhere"}, r"adapter\.init_from = './nowhere': no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            hub.load(str(folder), config(**changes))
    folder.rename(tmp_path / "other")
    with pytest.raises(UserError, match=r"is an adapter of 'org/model', model\.source = .*other': another base model"):
        hub.load(str(tmp_path / "other"), config())


@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_exact(tied, tmp_path):
    model = build(CONFIG.replace(tie_word_embeddings=tied), key=jax.random.key(1))
    save_weights(model, tmp_path / "m", jnp.float32)
    assert read_config(tmp_path / "m") == model.config
    assert_same(load_weights(build(model.config), tmp_path / "m", jax.random.key(0)), model)


def test_loading_quantizes_as_quantizing_in_memory_does(folder):
    arguments = dict(quantization=Quantization(), adapter=LoRAConfig(rank=2), dtype=jnp.float32)
    loaded = load_weights(build(CONFIG, **arguments), folder, jax.random.key(0))
    in_memory = build(CONFIG, key=jax.random.key(0), **arguments)
    # build(key) draws base and adapter from one key; the folder holds the base that key 0 draws.
    assert_same(loaded, in_memory)


GATE = "model.layers.0.block_sparse_moe.gate.weight"


def sharded(folder, dtype, kind=".safetensors"):
    """Two shards and an index in the place of model.safetensors; every other tensor lies in the first."""
    tensors = load_file(str(folder / "model.safetensors"))
    names, stem = sorted(tensors), "model" if kind == ".safetensors" else "pytorch_model"
    weight_map = {}
    for shard, part in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}-0000{shard}-of-00002{kind}"
        saved = {n: tensors[n].astype(dtype) for n in part}
        if kind == ".safetensors":
            save_file(saved, str(folder / file))
        else:
            save_torch(folder / file, saved)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / f"{stem}{kind}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4932108\n"


@pytest.mark.parametrize("kind", [".safetensors", ".bin"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float32])
def test_shards_of_every_precision(dtype, kind, folder):
    tensors = sharded(folder, dtype, kind)
    model = load_weights(build(CONFIG), folder, jax.random.key(0))
    expected = tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"].astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(model.layers.moe.w2.weight.get_value()[1, 3], expected)
    if dtype != np.float32:
        return
    (shard,) = folder.glob(f"*-00002-of-00002{kind}")
    whole, what = shard.read_bytes(), "safetensors file" if kind == ".safetensors" else "PyTorch checkpoint"
    for content, message in ((whole[:-100], f"is no whole {what}"), (POINTER, "is a Git LFS pointer, .* `git lfs pull`")):
        shard.write_bytes(content)
        with pytest.raises(UserError, match=rf"-00002-of-00002\{kind} {message}"):
            load_weights(build(CONFIG), folder, jax.random.key(0))
    shard.unlink()
    with pytest.raises(UserError, match=r"lacks (pytorch_)?model-00002-of-00002\S+, which its index names: download it again"):
        load_weights(build(CONFIG), folder, jax.random.key(0))


def test_shards_of_bin_beside_safetensors_are_not_read(folder):
    """The same model in both, as many repositories have it; the .bin is no file at all."""
    tensors = load_file(str(folder / "model.safetensors"))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "pytorch_model-1.bin")}))
    assert weight_files(folder) == [folder / "model.safetensors"]
    load_weights(build(CONFIG), folder, jax.random.key(0))


def test_an_index_of_bin_that_is_wrong(folder):
    sharded(folder, np.float32, ".bin")
    index = folder / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    for file in ("../pytorch_model.bin", "model.safetensors"):
        index.write_text(json.dumps({"weight_map": content["weight_map"] | {GATE: file}}))
        with pytest.raises(UserError, match=rf"names a file '{file}': expected \*\.bin files of the same folder"):
            load_weights(build(CONFIG), folder, jax.random.key(0))
    first = content["weight_map"][GATE]
    other = next(file for file in content["weight_map"].values() if file != first)
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {GATE: other}}))
    with pytest.raises(UserError, match=rf"{other} lacks tensor '{GATE}', which the index says it holds \(1 such\)"):
        load_weights(build(CONFIG), folder, jax.random.key(0))


def test_a_folder_without_weights_says_what_it_has(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    expected = (
        r"has none of model\.safetensors, model\.safetensors\.index\.json \(with its shards\), pytorch_model\.bin, "
        r"pytorch_model\.bin\.index\.json \(with its shards\); there is model-00001-of-00001\.safetensors, which is not read"
    )
    with pytest.raises(UserError, match=expected):
        load_weights(build(CONFIG), folder, jax.random.key(0))
    (folder / "config.json").write_bytes(POINTER)
    with pytest.raises(UserError, match=r"config\.json is a Git LFS pointer"):
        read_config(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update({GATE: "model-00002-of-00002.safetensors"}), f"00002-of-00002.safetensors lacks tensor '{GATE}'.*1 such"),
        (lambda m: m.update({"model.x": "model-00001-of-00002.safetensors"}), r"00001-of-00002\.safetensors lacks tensor 'model\.x'"),
        (lambda m: m.update({GATE: "../model.safetensors"}), r"names a file '\.\./model\.safetensors': expected \*\.safetensors files"),
        (lambda m: m.update({GATE: 3}), "lacks weight_map"),
        (lambda m: m.clear(), "lacks weight_map"),
    ],
)
def test_an_index_that_is_wrong(edit, message, folder):
    sharded(folder, jnp.float32)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    edit(content["weight_map"])
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        load_weights(build(CONFIG), folder, jax.random.key(0))


def test_an_index_or_config_that_is_no_json(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map"')
    with pytest.raises(UserError, match=r"index\.json, line 1: no whole JSON .* Download it again"):
        load_weights(build(CONFIG), folder, jax.random.key(0))
    for content, message in (
        ("[1]", "expected a JSON object, got list: download it again"),
        ("\udcff", "is not UTF-8 text"),
        ('{"model_type": "qwen2_moe"}', "model_type = 'qwen2_moe': expected one of mixtral"),
        ("{}", "model_type = None: expected one of mixtral"),
        ('{"model_type": "mixtral", "hidden_size": 8}', "lacks 'num_hidden_layers'"),
    ):
        (folder / "config.json").write_text(content, errors="surrogateescape")
        with pytest.raises(UserError, match=rf"config\.json.*{message}"):
            read_config(folder)


def test_both_dialects_of_config_json(folder):
    """transformers 5 writes rope_parameters and dtype where 4 writes rope_theta and torch_dtype."""
    four = json.loads((folder / "config.json").read_text())
    five = {k: v for k, v in four.items() if k not in ("rope_theta", "torch_dtype")}
    five |= {"rope_parameters": {"rope_theta": four["rope_theta"], "rope_type": "default"}, "dtype": "bfloat16"}
    expected = read_config(folder)
    (folder / "config.json").write_text(json.dumps(five))
    assert read_config(folder) == expected and expected.rope_theta == 1e4
    five["rope_parameters"] = {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 4.0}
    (folder / "config.json").write_text(json.dumps(five))
    said = r'rope_parameters\.rope_type = "dynamic" \(expected "default" or "yarn"\), rope_parameters\.factor = .*=\[rope_parameters\]'
    with pytest.raises(UserError, match=rf"config\.json: config\.json has {said}"):
        read_config(folder)
    assert read_config(folder, ["rope_parameters"]) == expected


def change(folder, edit):
    tensors = load_file(str(folder / "model.safetensors"))
    edit(tensors)
    save_file(tensors, str(folder / "model.safetensors"))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(GATE), f"tensor '{GATE}' is missing"),
        (lambda t: t.update({GATE: t[GATE][:, :5].copy()}), r"has shape \[4, 5\], expected \[4, 32\]"),
        (lambda t: t[GATE].fill(np.nan), f"'{GATE}' holds NaN"),
        (lambda t: t[GATE].fill(np.inf), f"'{GATE}' holds NaN or infinity"),
        (lambda t: t.update({GATE: t[GATE].astype(np.int8)}), f"'{GATE}' is int8: expected bfloat16, float16 or float32"),
        (lambda t: t.pop("lm_head.weight"), "tensor 'lm_head.weight' is missing"),
        (lambda t: t.update({GATE + ".absmax": t[GATE]}), "belongs to a quantized matrix, and .*nf4' is missing"),
        (lambda t: t.update({"model.layers.0.mlp.experts.gate_up_proj": t[GATE]}), "has shape .4, 32., expected .experts, rows, columns"),
        (lambda t: t.update({"model.layers.7.x": t[GATE]}), "1 tensors have no place"),
    ],
)
def test_faults_are_named(edit, message, folder):
    change(folder, edit)
    with pytest.raises(UserError, match=message):
        load_weights(build(CONFIG), folder, jax.random.key(0))


def test_truncated_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="no whole safetensors file"):
        load_weights(build(CONFIG), folder, jax.random.key(0))


def test_a_folder_of_another_kind(folder, tmp_path):
    """An adapter as a model, a model as an adapter, and a run as either."""
    lora = build(CONFIG, key=jax.random.key(0), adapter=LoRAConfig(2, 4.0, 0.0, ("gate",)))
    save_adapter(lora, tmp_path / "run/adapter", "base")
    for read, where, message in (
        (read_config, "run/adapter", r"holds no config\.json: .*, and this is an adapter: give its base model here"),
        (read_config, "run", r"holds no config\.json: .* a run: its adapter is \S+run/adapter, for adapter\.init_from"),
        (read_config, ".", r"holds no config\.json: .* a run: its model is \S+/model"),
        (read_adapter_config, "run", r"holds no adapter_config\.json: .* a run: its adapter is \S+run/adapter"),
        (read_adapter_config, "model", r"holds no adapter_config\.json: .*, and this is a model: give it as model\.source"),
    ):
        with pytest.raises(UserError, match=message):
            read(tmp_path / where)


def test_no_such_model(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        resolve(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"holds no config\.json"):
        read_config(tmp_path)


def test_adapter_round_trip_and_mismatches(tmp_path):
    def model(rank=2, targets=("w1", "gate", "v_proj")):
        return build(CONFIG, key=jax.random.key(0), adapter=LoRAConfig(rank=rank, alpha=8.0, targets=targets))

    trained = model()
    for variable in (trained.layers.moe.w1.lora.b, trained.layers.moe.router.lora.b, trained.layers.attention.v_proj.lora.b):
        variable.set_value(jax.random.normal(jax.random.key(5), variable.get_value().shape))
    save_adapter(trained, tmp_path, "base")
    again = model()
    load_adapter(again, tmp_path)
    assert_same(again, trained)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["gate", "v_proj", "w1"] and settings["r"] == 2 and settings["lora_alpha"] == 8
    with pytest.raises(UserError, match=r"rank 2.*has rank 4"):
        load_adapter(model(rank=4), tmp_path)
    with pytest.raises(UserError, match=r"adapts gate, v_proj, w1; the model's adapter gate, v_proj, w1, w2: set adapter\.targets"):
        load_adapter(model(targets=("w1", "w2", "gate", "v_proj")), tmp_path)
    with pytest.raises(UserError, match=r"adapts gate, v_proj, w1; the model's adapter w1: set"):
        load_adapter(model(targets=("w1",)), tmp_path)
    with pytest.raises(UserError, match=r"holds no adapter_config\.json"):
        load_adapter(again, tmp_path / "nowhere")
