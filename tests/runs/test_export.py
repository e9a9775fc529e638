"""`moejax export`: what is written computes what was trained, and nothing half-written is left."""

import json
import os
import re
import resource
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import ROOT, VECTORS, finished_run, full_logits
from transformers import PreTrainedTokenizerFast

import moejax
from moejax import cli
from moejax.config import dump
from moejax.contents import MadeOf
from moejax.data.tokenizer import load_tokenizer
from moejax.errors import UserError
from moejax.hub import merge, peft, weights
from moejax.hub.model import architecture, create_model
from moejax.hub.quantized_cache import Content
from moejax.hub.servers import SERVERS
from moejax.models.build import build
from moejax.models.config import LoRAConfig
from moejax.runs import export


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    finished_run(folder)
    return folder


def test_an_adapter_comes_out_as_it_was(run_folder, tmp_path, capsys):
    assert cli.main(["export", str(run_folder), "--out", str(tmp_path / "a")]) == 0
    assert "largest logit difference 0 " in capsys.readouterr().out
    name = "adapter_model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (run_folder / "adapter" / name).read_bytes()


def test_a_merged_model_computes_what_was_trained(run_folder, tmp_path, capsys):
    out = tmp_path / "m"
    assert cli.main(["export", str(run_folder), "--out", str(out), "--format", "merged"]) == 0
    assert "verified on" in capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert {v.dtype for v in load_file(str(out / "model.safetensors")).values()} == {jnp.dtype(jnp.bfloat16)}
    # transformers 4 knows no other name for the class.
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("format_", [pytest.param("peft", marks=pytest.mark.long), "fused", "merged"])
def test_one_a_for_two_matrices(format_, tmp_path, capsys):
    """What is written is compared with what was trained, matrix by matrix."""
    finished_run(tmp_path / "run", adapter={"rank": 2, "alpha": 4.0, "share": ["w1", "w3"]})
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--format", format_]) == 0
    assert ("verified on" if format_ == "merged" else "largest logit difference 0 ") in capsys.readouterr().out


@pytest.mark.parametrize("format_", ["merged", pytest.param("peft", marks=pytest.mark.long)])
def test_rows_of_added_tokens(format_, tmp_path, capsys):
    """Two that the embedding has and two that it lacks: compared with what was trained, the tokenizer written with them."""
    tokens = [f"<{n}>" for n in range(105)]  # behind the tokenizer's 409; the embedding has 512 rows
    rows = {"rank": 2, "alpha": 4.0, "token_rows": [409, 410, 512, 513]}
    model = {"source": str(ROOT / "assets/tiny-mixtral"), "vocabulary": 514}
    finished_run(tmp_path / "run", model=model, adapter=rows, added_tokens=tokens)
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--format", format_]) == 0
    out = capsys.readouterr().out
    assert "verified on" in out and ("resize_token_embeddings(514)" in out) == (format_ == "peft")
    assert load_tokenizer(str(tmp_path / "out")).convert_tokens_to_ids("<104>") == 513
    if format_ == "merged":
        assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 514
        assert moejax.load(tmp_path / "out").model.embed.weight.get_value().shape == (514, 128)
        moejax.load(tmp_path / "run").save_adapter(tmp_path / "a")
        assert load_tokenizer(str(tmp_path / "a")).convert_tokens_to_ids("<104>") == 513


def test_a_base_with_other_weights_is_refused(tmp_path):
    """Of the same names, sizes and config."""
    base, run, content = tmp_path / "base", tmp_path / "run", Content()
    shutil.copytree(ROOT / "assets/tiny-mixtral", base)
    experiment = finished_run(run, model={"source": str(base)})
    create_model(experiment, architecture(experiment, base), base, content)
    made_of = {"base": content.value, "platform": jax.default_backend()}
    (run / "config.yaml").write_text(dump(experiment.model_copy(update={"made_of": MadeOf(**made_of)})))
    export.export(run, tmp_path / "right", "peft", True, None)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + tensors["model.norm.weight"]
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(UserError, match=r"run was made of another content\. Changed: base: sha256 .* Put back"):
        export.export(run, tmp_path / "wrong", "peft", True, None)
    assert not (tmp_path / "wrong").exists()


def test_merging_is_pefts_merging(mixtral_folder, reference_config, mixtral_vectors, tmp_path):
    """The base and adapter that PyTorch wrote, merged here in fp32: the logits that PyTorch computed with the adapter."""
    settings = json.loads((VECTORS / "peft_all" / "adapter_config.json").read_text())
    targets = tuple(settings["target_modules"])
    model = build(reference_config, adapter=LoRAConfig(settings["r"], settings["lora_alpha"], 0.0, targets), dtype=jnp.float32)
    peft.load_adapter(model, VECTORS / "peft_all")
    with weights.ExitStack() as stack:
        files = weights.open_tensors(mixtral_folder, stack, reference_config)
        merged = {name: merge.merged_tensor(model, name, files, mixtral_folder) for name in files}
    save_file(merged, str(tmp_path / "model.safetensors"))
    plain = weights.load_weights(build(reference_config, dtype=jnp.float32), tmp_path, jax.random.key(0))
    with np.load(VECTORS / "lora_all.npz") as file:
        expected = file["logits"]
    ids, mask = mixtral_vectors["ids"].astype(np.int32), mixtral_vectors["mask"].astype(np.int32)
    logits = full_logits(plain, ids, mask, np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape) * mask)
    real = mask.astype(bool)
    np.testing.assert_allclose(logits[real], expected[real], atol=2e-5, rtol=0)


def test_shards_hold_what_one_file_holds(run_folder, tmp_path):
    experiment = export.open_run(run_folder)
    base = ROOT / "assets/tiny-mixtral"
    model = export._abstract(experiment, weights.read_config(base), run_folder)
    merge.save_merged(model, base, tmp_path / "one")
    seen = []
    total = merge.save_merged(model, base, tmp_path / "many", shard_bytes=1_000_000, progress=seen.append)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert sum(seen) == total == index["metadata"]["total_size"]
    files = sorted(set(index["weight_map"].values()))
    assert len(files) == 5 and files[0] == "model-00001-of-00005.safetensors"
    one, many = load_file(str(tmp_path / "one" / "model.safetensors")), {}
    for file in files:
        part = load_file(str(tmp_path / "many" / file))
        assert all(index["weight_map"][name] == file for name in part)
        assert sum(v.nbytes for v in part.values()) <= 1_000_000
        many |= part
    assert one.keys() == many.keys() and all(np.array_equal(one[name], many[name]) for name in one)


def test_a_model_trained_whole(tmp_path, capsys):
    folder = tmp_path / "whole"
    whole = {"adapter": None, "quantization": {}, "model": {"source": str(ROOT / "assets/tiny-blackmamba")}}
    finished_run(folder, **whole)
    shutil.copytree(ROOT / "assets/tiny-blackmamba", folder / "model")
    assert cli.main(["export", str(folder), "--out", str(tmp_path / "m")]) == 0
    # The same numbers, read as fp32 and as bf16: two programs, whose sums may be in another order.
    assert float(re.search(r"largest logit difference (\S+) ", capsys.readouterr().out)[1]) < 5e-5
    ours, written = (load_file(str(f / "model.safetensors")) for f in (folder / "model", tmp_path / "m"))
    assert ours.keys() == written.keys() and all(np.array_equal(ours[name], written[name]) for name in ours)
    assert cli.main(["export", str(folder), "--out", str(tmp_path / "a"), "--format", "peft"]) == 2
    assert "trained the whole model, so there is no adapter to export: use --format merged" in capsys.readouterr().err


def nothing_left(folder):
    return list(folder.iterdir()) == []


def test_a_merge_without_the_adapter_is_found_out(run_folder, tmp_path, monkeypatch):
    """The mistake that nobody notices elsewhere: a file that loads, and is the base."""
    complete = export._abstract

    def without_adapter(*arguments):
        model = complete(*arguments)
        for _, lora in peft.adapted(model).values():
            lora.b.set_value(0 * lora.b.get_value())
        return model

    monkeypatch.setattr(export, "_abstract", without_adapter)
    with pytest.raises(UserError, match="does not compute what was trained"):
        export.export(run_folder, tmp_path / "m", "merged", True, None)
    assert nothing_left(tmp_path)


@pytest.fixture
def full_disk():
    """Every write beyond the first 5,000 bytes of a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("format_", ["merged", "peft", "fused"])
def test_a_full_disk_leaves_nothing(format_, run_folder, tmp_path, full_disk):
    name = r"/m\.\S+\.tmp/(adapter_)?model\.safetensors"
    with pytest.raises(UserError, match=name + r" cannot be written \(File too large\): nothing was left there; free space"):
        export.export(run_folder, tmp_path / "m", format_, False, None)
    assert nothing_left(tmp_path)


def test_two_exports_to_one_place(run_folder, tmp_path, monkeypatch):
    """The one that ends first is the one that stays, whole."""
    compare = export._compare

    def and_another(*arguments):
        monkeypatch.setattr(export, "_compare", compare)
        export.export(run_folder, tmp_path / "m", "peft", False, None)
        return compare(*arguments)

    monkeypatch.setattr(export, "_compare", and_another)
    with pytest.raises(UserError, match=r"m has been written meanwhile, by another export"):
        export.export(run_folder, tmp_path / "m", "peft", True, None)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "m"]


def test_a_full_disk_at_the_tokenizer(run_folder, tmp_path, monkeypatch):
    """The tokenizers library raises a bare Exception then."""

    def full(self, folder):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(UserError, match=r"m could not be written \(.*tokenizer.json: No space left on device"):
        export.export(run_folder, tmp_path / "m", "merged", False, None)
    assert nothing_left(tmp_path)


def test_little_room_is_told_before_anything_is_written(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(export.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(UserError, match=r"has 0 bytes free, the model takes "):
        export.export(run_folder, tmp_path / "m", "merged", False, None)
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_files_have_the_rights_that_the_umask_gives(mask, mode, run_folder, tmp_path):
    before = os.umask(mask)
    try:
        export.export(run_folder, tmp_path / "a", "peft", False, None)
        export.export(run_folder, tmp_path / "m", "merged", False, None)
    finally:
        os.umask(before)
    files = [path for folder in ("a", "m") for path in (tmp_path / folder).iterdir()]
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {path.name: oct(mode) for path in files}


def test_what_cannot_be_exported(run_folder, tmp_path, capsys):
    def refused(*arguments):
        assert cli.main(["export", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    (tmp_path / "there").mkdir()
    assert "there exists already: choose another --out" in refused(run_folder, "--out", tmp_path / "there")
    assert "is not a finished run" in refused(tmp_path / "there", "--out", tmp_path / "m")
    finished_run(tmp_path / "random", model={"preset": "mixtral-tiny"}, tokenizer=str(ROOT / "assets/tiny-mixtral/tokenizer.json"))
    assert "its base has random weights" in refused(tmp_path / "random", "--out", tmp_path / "m")
    assert not (tmp_path / "m").exists()
    # Of an adapter on everything, in a server's format.
    assert "SGLang 0.5.23 cannot hold adapters on gate (the router" in refused(run_folder, "--out", tmp_path / "m", "--for", "sglang")
    assert "--push x: no name of a repository" in refused(run_folder, "--out", tmp_path / "m", "--push", "x")
    assert "--public says how to upload" in refused(run_folder, "--out", tmp_path / "m", "--public")
    assert not (tmp_path / "m").exists()
    assert "--for tgi: what it loads is written by --format merged" in refused(run_folder, "--out", tmp_path / "m", "--for", "tgi")
    told = refused(run_folder, "--out", tmp_path / "m", "--format", "mergde")
    assert "--format mergde: expected one of peft, fused, merged, gguf; did you mean merged?" in told and "usage" not in told


@pytest.mark.parametrize(
    ("server", "targets", "named"),
    [
        ("vllm", ["o_proj", "gate", "w1", "w2", "w3"], ["gate", "o_proj", "w1", "w2", "w3"]),
        pytest.param("sglang", ["o_proj", "w1", "w2", "w3"], ["down_proj", "gate_proj", "o_proj", "up_proj"], marks=pytest.mark.long),
    ],
)
def test_an_adapter_for_a_server(server, targets, named, tmp_path, capsys):
    """The tensors that were trained, under the names that its loader looks for; verified as written, and said how it is served."""
    finished_run(tmp_path / "run", adapter={"rank": 2, "alpha": 4.0, "targets": targets}, model={
        "source": str(ROOT / "assets/tiny-mixtral"), "experts_per_token": 8})  # fmt: skip
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "a"), "--for", server]) == 0
    out, written = capsys.readouterr().out, tmp_path / "a"
    assert "largest logit difference 0 " in out and f"{SERVERS[server].title} {SERVERS[server].version} loads it" in out
    assert """'{"num_experts_per_tok": 8}'""" in out and f"a={written}" in out
    assert json.loads((written / "adapter_config.json").read_text())["target_modules"] == named
    name = "adapter_model.safetensors"
    assert (written / name).read_bytes() == (tmp_path / "run/adapter" / name).read_bytes()
    card = (written / "README.md").read_text()
    assert "--lora-modules a=a" in card or "--lora-paths a=a" in card


def test_a_push_follows_what_is_written_and_compared(run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("moejax.hub.push.push", lambda folder, name, public: f"{name} of {sorted(p.name for p in folder.iterdir())}")
    given = ["export", str(run_folder), "--out", str(tmp_path / "a"), "--push", "me/tuned"]
    assert cli.main(given) == 0
    out = capsys.readouterr().out
    files = "['README.md', 'adapter_config.json', 'adapter_model.safetensors']"
    assert out.index("verified on") < out.index(f"uploaded: me/tuned of {files}")
