"""model.download=stream: a shard at a time, with the values of whole files, cut anywhere; what a disk must hold is reported first."""

import errno
import fcntl
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from played_hub import ID, SHA, Hub
from safetensors.numpy import load_file, save_file
from support import ROOT
from test_loading import fused
from test_weights import CONFIG, assert_same

from moejax import config
from moejax.contents import base_content
from moejax.errors import UserError
from moejax.hub import model as hub_model
from moejax.hub import shards, snapshot, weights
from moejax.hub.names import attribute, tensors
from moejax.hub.quantized_cache import Content
from moejax.hub.save import save_weights, write_model
from moejax.models.build import build
from moejax.models.config import PRESETS, Quantization
from moejax.runs import export
from moejax.training import loop

KEY = jax.random.key(0)
INDEX = "model.safetensors.index.json"
FETCH_FILE = snapshot.fetch_file


def saved(folder, shard_bytes=16_000):
    """A tiny Mixtral in bf16, its matrices in order: experts and layers lie in two shards."""
    model = build(CONFIG, key=KEY, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)

    def value(name):
        (place,) = tensors(CONFIG)[name]
        held = getattr(attribute(model, place.path), place.attr).get_value()
        return np.asarray(held[tuple(i for i in (place.layer, place.expert) if i is not None)])

    write_model(model, folder, value, jnp.bfloat16, shard_bytes=shard_bytes)
    return folder


def experiment(tmp_path, download="stream", **sections):
    content = {
        "name": download, "runs_dir": str(tmp_path / "runs"), "model": {"source": ID, "download": download},
        "quantization": {"format": "nf4", "cache": str(tmp_path / "cache")}, "adapter": {"rank": 2, "targets": ["gate", "w2"]},
        "data": {"batching": "fixed", "row_tokens": 16, "max_length": 16, "batch_rows": 2},
        "training": {"steps": 1, "compute_dtype": "float32"},
    }  # fmt: skip
    return config.Experiment.model_validate(content | sections)


def loaded(folder, quantization=None, **arguments):
    """The base in NF4, and the hash of its weights."""
    content = Content()
    model = build(weights.read_config(folder), quantization=quantization or Quantization(), dtype=jnp.bfloat16, **arguments)
    return weights.load_weights(model, folder, KEY, content=content), content.value


def test_killed_resumed_and_equal_to_the_bit_on_the_disk_of_one_shard(tmp_path):
    original = saved(tmp_path / "original")
    names = sorted(path.name for path in original.glob("*.safetensors"))
    assert len(names) == 9
    largest = max((original / name).stat().st_size for name in names)
    hub, asked = Hub(original, {names[0]: "busy", names[3]: "often", names[6]: "cut", names[7]: "down"}), experiment(tmp_path)
    hub.stream(asked, kill_at=names[2])
    assert hub.fetched == names[:3]
    (folder,) = (tmp_path / "cache").iterdir()
    assert {path.name for path in folder.glob("*.safetensors")} == set(names[:2]) and not (folder / INDEX).exists()
    hub.stream(asked, kill_at=names[5])
    assert hub.fetched == names[2:6]
    # A bit of what is kept of the second shard turns over.
    content = bytearray((folder / names[1]).read_bytes())
    content[len(content) * 2 // 3] ^= 4
    (folder / names[1]).write_bytes(content)
    given, beside_what_is_kept = hub.stream(asked)
    assert given == str(folder) and hub.fetched == [names[1], *names[5:]] and hub.resumed == [names[6]] and not hub.troubles
    assert 0.9 * largest < beside_what_is_kept < largest + 2000  # huggingface_hub makes notes
    hub.server.shutdown()
    assert not (folder / "fetching").exists() and not any(p.suffix == ".safetensors" for p in (tmp_path / "cache-hub").rglob("*"))
    model, content = loaded(folder)
    assert_same(model, loaded(original)[0])
    assert content == loaded(original)[1]
    assert weights.files_of(folder) == weights.files_of(original) and base_content(folder) == base_content(original)


# In this process: what the Hub's cache has are the small files, and two functions play the Hub.


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Its repository, a folder to be filled; `fetched` are the names of files that were."""
    from huggingface_hub import constants

    repository, fetched = tmp_path / "repository", []
    repository.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    small = tmp_path / "hub/models--org--name/snapshots" / SHA

    def publish():
        shutil.copytree(repository, small, ignore=shutil.ignore_patterns("*.safetensors"))
        (tmp_path / "hub/models--org--name/refs").mkdir()
        (tmp_path / "hub/models--org--name/refs/main").write_text(SHA)

    def fetch_file(source, commit, file, folder):
        assert (source, commit) == (ID, SHA)
        fetched.append(file)
        folder.mkdir(exist_ok=True)
        return shutil.copy(repository / file, folder / file)

    def weight_sizes(*_):
        return {path.name: path.stat().st_size for path in repository.glob("*.safetensors")}

    monkeypatch.setattr(snapshot, "fetch_file", fetch_file)
    monkeypatch.setattr(snapshot, "weight_sizes", weight_sizes)
    return SimpleNamespace(repository=repository, small=small, publish=publish, fetched=fetched)


@pytest.mark.parametrize("double", [True, False])
def test_fused_experts_in_fp32_and_a_router_that_stays(double, hub, tmp_path):
    """One file without an index, experts stacked as transformers 5 has them."""
    save_weights(build(CONFIG, key=KEY), hub.repository, jnp.float32)
    file = hub.repository / "model.safetensors"
    save_file(fused(load_file(str(file))), str(file))
    hub.publish()
    asked = experiment(tmp_path, quantization={
        "format": "nf4", "double": double, "modules": ["experts", "attention"], "cache": str(tmp_path / "cache")
    })  # fmt: skip
    folder = hub_model.base_folder(asked)
    assert hub.fetched == ["model.safetensors"] and hub_model.base_folder(asked) == folder and len(hub.fetched) == 1
    quantization = Quantization(double, ("experts", "attention"))
    model, content = loaded(folder, quantization)
    expected, other = loaded(hub.repository, quantization)
    assert_same(model, expected)
    assert content == other and weights.files_of(folder) == weights.files_of(hub.repository)
    other = asked.changed("quantization", modules=("experts",))
    assert hub_model.base_folder(other) != folder, "what is quantized otherwise lies elsewhere"


def test_bits_that_change_later_and_a_file_that_is_cut(hub, tmp_path):
    saved(hub.repository)
    hub.publish()
    asked = experiment(tmp_path)
    folder = hub_model.base_folder(asked)
    names = list(hub.fetched)
    expected, _ = loaded(folder)
    content = bytearray((folder / names[3]).read_bytes())
    content[len(content) * 2 // 3] ^= 4
    (folder / names[3]).write_bytes(content)
    with pytest.raises(UserError, match=rf"{names[3]}: tensor .* is not what was written there: remove this file, and start again"):
        loaded(folder)
    (folder / names[3]).unlink()
    (folder / names[6]).write_bytes((folder / names[6]).read_bytes()[:-100])
    assert hub_model.base_folder(asked) == folder
    assert hub.fetched[len(names) :] == [names[3], names[6]]
    assert_same(loaded(folder)[0], expected)


def test_shards_of_the_hubs_own_cache_are_read_there_and_stay(hub, tmp_path):
    saved(hub.repository)
    hub.publish()
    names = sorted(path.name for path in hub.repository.glob("*.safetensors"))
    old = {"model.norm.weight": np.zeros(CONFIG.hidden_size, jnp.bfloat16)}  # which the index has in another shard
    save_file(load_file(str(hub.repository / names[0])) | old, str(hub.repository / names[0]))
    shutil.copy(hub.repository / names[0], hub.small)
    folder = hub_model.base_folder(experiment(tmp_path))
    assert hub.fetched == names[1:] and (hub.small / names[0]).is_file()
    assert_same(loaded(folder)[0], loaded(hub.repository)[0])
    for name in names:
        shutil.copy(hub.repository / name, hub.small)
    shutil.rmtree(tmp_path / "cache")
    assert hub_model.base_folder(experiment(tmp_path)) == hub.small, "all of it is there: nothing to stream"


def test_what_is_wrong_is_told_before_anything_is_fetched(hub, tmp_path):
    saved(hub.repository)
    hub.publish()
    index = hub.small / INDEX
    content = json.loads(index.read_text())
    shard = content["weight_map"]["model.norm.weight"]
    for edit, message in (
        ({"model.extra.weight": shard}, r"1 tensors have no place in a Mixtral of 2 layers.*'model\.extra\.weight'"),
        ({"model.norm.weight.quant_state.bitsandbytes__nf4": shard}, r"a model in 4 bits already.*model\.download=whole"),
        ({"model.layers.0.mlp.experts.down_proj_blocks": shard}, r"a model in 4 bits already.*model\.download=whole"),
        ({"model.norm.weight": "pytorch_model.bin"}, r"names a file 'pytorch_model\.bin': expected \*\.safetensors"),
        ({"model.norm.weight": "gone.safetensors"}, r"the repository has no gone\.safetensors .*set model\.download=whole"),
    ):
        index.write_text(json.dumps({"weight_map": content["weight_map"] | edit}))
        with pytest.raises(UserError, match=message):
            hub_model.base_folder(experiment(tmp_path))
    assert hub.fetched == [] and not (tmp_path / "cache").exists()


def test_a_bad_number_names_its_tensor(hub, tmp_path):
    saved(hub.repository)
    hub.publish()
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    shard = hub.repository / json.loads((hub.small / INDEX).read_text())["weight_map"][name]
    held = load_file(str(shard))
    held[name] = held[name].copy()
    held[name][3, 5] = np.nan
    save_file(held, str(shard))
    with pytest.raises(UserError, match=rf"{shard.name}: tensor '{name}' holds NaN or infinity"):
        hub_model.base_folder(experiment(tmp_path))
    (folder,) = (tmp_path / "cache").iterdir()
    assert not (folder / shard.name).exists() and not list(folder.glob("*.tmp"))


def test_a_disk_that_fills_up_and_a_network_that_ends(hub, tmp_path, monkeypatch):
    saved(hub.repository)
    hub.publish()
    fetch, names = snapshot.fetch_file, sorted(snapshot.weight_sizes())

    def third(source, commit, file, folder):
        if file == names[2]:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder / file))
        return fetch(source, commit, file, folder)

    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "fetch_file", third)
        with pytest.raises(UserError, match=rf"{names[2]} cannot be written \(No space left on device\): make room there"):
            hub_model.base_folder(experiment(tmp_path))
        patch.setattr(snapshot, "fetch_file", FETCH_FILE)
        with pytest.raises(UserError, match=rf"{names[2]} of org/name at a+ could not be fetched .*check the network and start again"):
            hub_model.base_folder(experiment(tmp_path))
    folder = hub_model.base_folder(experiment(tmp_path))
    assert hub.fetched == names and sorted(path.name for path in folder.glob("*.safetensors")) == names


def test_another_process_that_fetches_is_waited_for(hub, tmp_path, monkeypatch):
    told = threading.Event()
    monkeypatch.setattr(shards, "note", lambda text: told.set())
    saved(hub.repository)
    hub.publish()
    asked = experiment(tmp_path)
    folder = hub_model.base_folder(asked)
    done = len(hub.fetched)
    (folder / INDEX).rename(tmp_path / INDEX)
    (folder / hub.fetched[0]).rename(tmp_path / "first")
    with (folder / "lock").open("w") as other, ThreadPoolExecutor(1) as pool:
        fcntl.flock(other, fcntl.LOCK_EX)
        waiting = pool.submit(hub_model.base_folder, asked)
        assert told.wait(timeout=60)
        (tmp_path / "first").rename(folder / hub.fetched[0])  # what the other one did meanwhile
        (tmp_path / INDEX).rename(folder / INDEX)
        fcntl.flock(other, fcntl.LOCK_UN)
        assert waiting.result(timeout=60) == folder and len(hub.fetched) == done


@pytest.mark.parametrize(
    "quantization", [{"format": "none"}, {"format": "nf4", "cache": None}]
)
def test_what_cannot_be_streamed_is_refused(quantization, tmp_path):
    with pytest.raises(ValueError, match=r"model\.download = stream keeps what it quantized.*or model\.download=whole"):
        experiment(tmp_path, quantization=quantization)


def test_the_disk_is_asked_first(hub, tmp_path, monkeypatch):
    saved(hub.repository)
    hub.publish()
    sizes = snapshot.weight_sizes()
    total, largest = sum(sizes.values()), max(sizes.values())
    whole, stream = experiment(tmp_path, "whole"), experiment(tmp_path)

    def free(nbytes):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, nbytes))

    free(total - 1)
    with pytest.raises(UserError, match=rf"too small: .* of weights in {tmp_path}/hub; .* free.*HF_HOME=DIR, model\.download=stream"):
        hub_model.base_folder(whole)
    monkeypatch.setattr(hub_model, "CACHED_FROM_BYTES", 1)
    free(total + 1000)
    with pytest.raises(UserError, match=r"of weights in .* and .* of 4-bit weights in .*/cache, together .*quantization\.cache=DIR"):
        hub_model.base_folder(whole)
    with pytest.raises(UserError, match="the disk is too small"):  # by a run before its data are read
        loop.run(whole.changed("data", source="nowhere.json", batching="pack"), resume=False)
    free(largest)
    with pytest.raises(UserError, match=r"of one shard in .* and .* of 4-bit weights in .*set quantization\.cache=DIR"):
        hub_model.base_folder(stream)
    assert hub.fetched == [] and not (tmp_path / "cache").exists()
    model = build(CONFIG, quantization=Quantization())
    needed = largest + shards.kept_bytes(model, total)
    free(needed)
    (told,) = hub_model.check_disk(stream, hub.small)
    assert told.startswith("disk: ") and told.endswith(" free")
    folder = hub_model.base_folder(stream)
    kept = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert abs(kept - shards.kept_bytes(model, total)) < 0.1 * kept
    free(0)
    assert hub_model.base_folder(stream) == folder and hub_model.check_disk(stream, hub.small) == []


def test_the_disk_of_a_large_model():
    """Of 93 GB of shards stay 24.5: half a byte a weight, an 8-bit scale for each 64, an fp32 one for each 256 of those."""
    sizes = PRESETS["mixtral-8x7b"]
    kept = shards.kept_bytes(build(sizes, quantization=Quantization()), 2 * sizes.parameters[0])
    plain = 2 * sizes.vocab_size * sizes.hidden_size
    expected = (sizes.parameters[0] - plain) * (1 / 2 + 1 / 64 + 4 / 64 / 256) + 2 * plain
    assert expected < kept < 1.001 * expected and 24.4e9 < kept < 24.5e9


@pytest.mark.long
def test_a_run_its_resumption_and_its_merged_model_are_those_of_whole_files(hub, tmp_path):
    for path in (ROOT / "assets/tiny-mixtral").iterdir():
        shutil.copy(path, hub.repository)
    hub.publish()
    stream = experiment(tmp_path)
    whole = experiment(tmp_path, "whole", model={"source": str(hub.repository)})
    runs = [tmp_path / "runs" / one.name for one in (stream, whole)]
    for one in (stream, whole):
        assert loop.run(one, resume=False) == 0
    adapters = [(folder / "adapter/adapter_model.safetensors").read_bytes() for folder in runs]
    assert adapters[0] == adapters[1]
    made_of = [config.load(folder / "config.yaml").made_of for folder in runs]
    assert made_of[0] == made_of[1] and made_of[0].base_files is not None
    for folder, verify in zip(runs, (True, False), strict=True):
        export.export(folder, tmp_path / f"{folder.name}-merged", "merged", verify, None)
    merged = [(tmp_path / f"{folder.name}-merged/model.safetensors").read_bytes() for folder in runs]
    assert merged[0] == merged[1] and hub.fetched == ["model.safetensors"]
    # Nothing streamed any more, and the shard in the Hub's own cache.
    shutil.copy(hub.repository / "model.safetensors", hub.small)
    shutil.rmtree(tmp_path / "cache")
    assert loop.run(stream.changed("model", download="whole"), resume=True) == 0
