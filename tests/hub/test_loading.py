"""Streaming: layouts, dtypes, the cache of quantized weights, and what a full disk or a wrong index does."""

import encodings.utf_8_sig  # noqa: F401  before a test gives up the right to read Python's own files
import errno
import json
import math
import os
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support import ROOT, VECTORS, full_logits
from test_weights import CONFIG, arrays, assert_same

from moejax import config as experiments
from moejax.errors import UserError
from moejax.hub import quantized_cache, safetensors_file
from moejax.hub.save import save_weights
from moejax.hub.weights import check_files, load_weights, read_config, report
from moejax.models.build import build
from moejax.models.config import Quantization

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    save_weights(build(CONFIG, key=KEY), folder, jnp.float32)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    for path in whole.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def load(folder, **arguments):
    return load_weights(build(CONFIG, quantization=Quantization(), dtype=jnp.float32), folder, KEY, **arguments)


def rewrite(folder, edit):
    tensors = load_file(str(folder / "model.safetensors"))
    save_file(edit(tensors), str(folder / "model.safetensors"))


def fused(tensors):
    """As transformers 5 holds a Mixtral in memory: w1's rows, then w3's, experts stacked."""
    out = {name: value for name, value in tensors.items() if "block_sparse_moe" not in name}
    for layer in range(CONFIG.num_layers):
        old, new = f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.mlp"
        w1, w2, w3 = (np.stack([tensors[f"{old}.experts.{e}.{w}.weight"] for e in range(4)]) for w in ("w1", "w2", "w3"))
        out |= {f"{new}.experts.gate_up_proj": np.concatenate([w1, w3], 1), f"{new}.experts.down_proj": w2}
        out[f"{new}.gate.weight"] = tensors[f"{old}.gate.weight"]
    return out


def test_fused_experts_are_the_same_model(folder):
    expected = load(folder)
    rewrite(folder, fused)
    assert_same(load(folder), expected)
    rewrite(folder, lambda t: t | {"model.layers.0.mlp.experts.down_proj": t["model.layers.0.mlp.experts.down_proj"][0]})
    with pytest.raises(UserError, match=r"model.safetensors: tensor 'model.layers.0.mlp.experts.down_proj' has shape \[32, 64\]"):
        load(folder)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_read_exactly(dtype, folder):
    rewrite(folder, lambda t: {name: value.astype(dtype) for name, value in t.items()})
    stored = load_file(str(folder / "model.safetensors"))
    model = load_weights(build(CONFIG, param_dtype=jnp.float32), folder, KEY)
    w2 = stored["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    np.testing.assert_array_equal(model.layers.moe.w2.weight.get_value()[1, 2], w2.astype(np.float32))
    np.testing.assert_array_equal(model.embed.weight.get_value(), stored["model.embed_tokens.weight"].astype(np.float32))


def test_a_model_is_no_view_of_its_file(folder, tmp_path):
    """A file that is written over in place must not change the model that was read from it, nor may its cache."""
    model, cached = load(folder, cache=tmp_path / "cache"), load(folder, cache=tmp_path / "cache")
    before = [np.array(leaf) for leaf in arrays(model).values()]
    for path in (folder / "model.safetensors", *(tmp_path / "cache").iterdir()):
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.write(b"\xff" * size)
    for again in (model, cached):
        for leaf, value in zip(arrays(again).values(), before, strict=True):
            np.testing.assert_array_equal(leaf, value)


def test_a_tensor_of_integers_is_refused(folder):
    rewrite(folder, lambda t: t | {"model.norm.weight": np.ones(32, np.int32)})
    with pytest.raises(UserError, match=r"model.safetensors: tensor 'model.norm.weight' is int32: expected bfloat16"):
        load(folder)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32])
def test_one_bad_number_in_what_is_quantized(dtype, number, double, folder):
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"

    def spoil(tensors):
        tensors = {key: np.array(value.astype(dtype)) for key, value in tensors.items()}
        tensors[name][3, 5] = number
        return tensors

    rewrite(folder, spoil)
    with pytest.raises(UserError, match=rf"model\.safetensors: tensor '{name}' holds NaN or infinity"):
        load_weights(build(CONFIG, quantization=Quantization(double=double)), folder, KEY)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_file_that_may_not_be_read(name, whole):
    """As another user where the tests run as root, who may read everything."""
    with tempfile.TemporaryDirectory() as folder_name:
        folder, user = Path(folder_name), os.geteuid()
        for path in whole.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / name).touch()
        (folder / name).chmod(0)
        folder.chmod(0o755)
        try:
            if user == 0:
                os.seteuid(65534)
            with pytest.raises(UserError, match=rf"{name}.* .*Permission denied"):
                load_weights(build(read_config(folder)), folder, KEY)
        finally:
            os.seteuid(user)


def test_report_counts_every_weight(folder):
    lines = report(load(folder))
    experts = next(line for line in lines if line.startswith("experts"))
    assert experts.startswith("experts: 49.2 k parameters, NF4, ") and experts.endswith(" kB; 0 left unquantized")
    assert any(line.startswith("embeddings: 1.02 k parameters, float32") for line in lines)


class TestCache:
    @pytest.mark.parametrize("at_once", [0, 1 << 28])
    def test_second_start_quantizes_nothing_and_is_the_same(self, at_once, folder, tmp_path, monkeypatch):
        monkeypatch.setattr(quantized_cache, "_at_once_bytes", lambda: at_once)
        cache = tmp_path / "cache"
        first = load(folder, cache=cache)
        assert [path.suffix for path in cache.iterdir()] == [".safetensors"]
        monkeypatch.setattr("moejax.models.ops.nf4.encode", None)
        assert_same(load(folder, cache=cache), first)

    def test_other_content_settings_or_version_are_made_anew(self, folder, tmp_path, monkeypatch):
        cache = tmp_path / "cache"
        load(folder, cache=cache)
        rewrite(folder, lambda t: t | {"model.norm.weight": t["model.norm.weight"] * 2})
        changed = load(folder, cache=cache)
        assert_same(changed, load(folder))
        load_weights(build(CONFIG, quantization=Quantization(double=False)), folder, KEY, cache=cache)
        monkeypatch.setattr(quantized_cache, "__version__", "another")
        load(folder, cache=cache)
        assert len(list(cache.iterdir())) == 4

    def test_one_that_another_process_lacks_is_neither_read_nor_written_again(self, folder, tmp_path, monkeypatch):
        """Of weights that all read together, on machines with a disk each."""
        cache = tmp_path / "cache"
        first = load(folder, cache=cache)
        (path,) = cache.iterdir()
        written = path.stat().st_ino, path.stat().st_mtime_ns
        monkeypatch.setattr(quantized_cache, "deal_of", lambda *_: "dealt out")
        monkeypatch.setattr(quantized_cache.processes, "gathered", lambda text: [text, ""])
        assert_same(load(folder, cache=cache), first)
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == written
        path.unlink()
        assert_same(load(folder, cache=cache), first)
        assert path.is_file()

    def test_a_damaged_one_is_ignored_and_replaced(self, folder, tmp_path):
        cache = tmp_path / "cache"
        first = load(folder, cache=cache)
        (path,) = cache.iterdir()
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        assert_same(load(folder, cache=cache), first)
        assert path.read_bytes() == content

    @pytest.mark.parametrize("at_once", [0, 1 << 28])
    def test_one_changed_bit_is_seen(self, at_once, folder, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(quantized_cache, "_at_once_bytes", lambda: at_once)
        cache = tmp_path / "cache"
        first = load(folder, cache=cache)
        (path,) = cache.iterdir()
        content = path.read_bytes()
        start = content.index(first.layers.moe.w2.weight.get_value().canonical().parts["codes"].tobytes())
        path.write_bytes(content[: start + 77] + bytes([content[start + 77] ^ 4]) + content[start + 78 :])
        assert_same(load(folder, cache=cache), first)
        assert "moe.w2.weight.codes is not what was written there; it is made anew" in capsys.readouterr().err
        assert path.read_bytes() == content

    def test_a_full_disk_costs_the_cache_and_not_the_load(self, folder, tmp_path, monkeypatch, capsys):
        cache = tmp_path / "cache"
        expected = load(folder)
        opened = safetensors_file.Path.open

        class Full:
            def __init__(self, file):
                self.file, self.room = file, 20_000

            def write(self, data):
                self.room -= len(data)
                if self.room < 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return self.file.write(data)

            def close(self):
                self.file.close()
                if self.room < 0:  # what was still in its buffer
                    raise OSError(errno.ENOSPC, "No space left on device")

            def __getattr__(self, name):
                return getattr(self.file, name)

        monkeypatch.setattr(safetensors_file.Path, "open", lambda p, m="r", *a: Full(opened(p, m, *a)) if m == "wb" else opened(p, m, *a))
        assert_same(load(folder, cache=cache), expected)
        assert "quantized weights are not kept" in capsys.readouterr().err
        assert list(cache.iterdir()) == []


def test_an_index_that_names_a_tensor_no_file_has(folder):
    names = dict.fromkeys([*load_file(str(folder / "model.safetensors")), "model.extra.weight"], "model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(UserError, match=r"model.safetensors lacks tensor 'model.extra.weight'"):
        load(folder)
    index.write_text("{")
    with pytest.raises(UserError, match=r"index.json, line 1: no whole JSON"):
        load(folder)


def test_writer_leaves_nothing_half_written(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(RuntimeError), safetensors_file.Writer(path, {"a": ((2,), np.float32)}, {}) as writer:
        writer.write("a", np.ones(1, np.float32))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with safetensors_file.Writer(path, {"a": ((2, 3), jnp.bfloat16), "b": ((), np.float32)}, {}) as writer:
        writer.write("b", np.float32(7))
        for row in (1, 0):
            writer.write("a", np.full(3, row, jnp.bfloat16), row * 6)
    read = load_file(str(path))
    np.testing.assert_array_equal(read["a"], np.array([[0] * 3, [1] * 3], jnp.bfloat16))
    assert read["b"] == 7

    def refuse(new):
        assert load_file(str(new)).keys() == {"a"}  # whole, under another name
        raise UserError("not what it should be")

    with pytest.raises(UserError, match="not what it should be"):
        safetensors_file.write_file(path, {"a": np.ones(2, np.float32)}, refuse)
    assert load_file(str(path)).keys() == {"a", "b"} and list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_of_transformers_5():
    """tests/oracles/save_mixtral.py wrote it: other names in config.json, several shards; the logits are PyTorch's."""
    folder = VECTORS / "saved_by_transformers5"
    assert len(list(folder.glob("*.safetensors"))) == 7
    model = load_weights(build(read_config(folder), dtype=jnp.float32), folder, KEY)
    with np.load(folder / "logits.npz") as file:
        tokens, expected = jnp.asarray(file["tokens"]), file["logits"]
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    logits = full_logits(model, tokens, jnp.ones_like(tokens), positions)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["tiny-mixtral", "tiny-blackmamba", "tiny-qwen3-moe"])
def test_a_bundled_model_is_what_its_card_says(name):
    folder = ROOT / "assets" / name
    config, card = read_config(folder), (folder / "README.md").read_text()
    made = experiments.load(ROOT / f"configs/pretrain_{name.replace('-', '_')}.yaml").model.architecture(None)
    assert config == made.replace(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id)  # a BlackMamba's file has none
    with safe_open(str(folder / "model.safetensors"), "np") as file:
        stored = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    assert stored == config.parameters[0] and f" of {stored:,} parameters ({config.num_layers} layers" in card
    assert f"{config.num_experts} experts of which {config.experts_per_token} a token" in card
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5_000_000
    check_files(build(config), folder)


@pytest.mark.parametrize("name", ["tiny-mixtral", "tiny-blackmamba", "tiny-qwen3-moe"])
def test_other_shapes_than_configs_are_seen_in_the_headers(name):
    """Before anything is compiled or loaded; expert by expert, and of tensors that hold two of our matrices."""
    base = ROOT / "assets" / name
    sizes = read_config(base)
    check_files(build(sizes), base)
    with pytest.raises(UserError, match=r"has shape \[512, 128\], expected \[511, 128\] by its config\.json"):
        check_files(build(sizes.replace(vocab_size=511)), base)
    with pytest.raises(UserError, match=r"experts\.0\.\S+' has shape .*by its config\.json"):
        check_files(build(sizes.replace(intermediate_size=96)), base)
