"""Files of strangers: nothing in them runs, and none fills the memory. Pickles: hub/test_torch_file.py; indexes with paths:
hub/test_weights.py; templates that loop: data/test_turns.py; SECURITY.md has the list."""

import gzip
import json
import re
import shutil

import pytest
from support import ROOT

from moejax import processes
from moejax.config import load
from moejax.data import compression, places, windows
from moejax.data.tokenizer import load_tokenizer
from moejax.errors import UserError
from moejax.hub.safetensors_file import Reader
from moejax.hub.weights import read_config
from moejax.yaml_file import read_yaml


@pytest.fixture
def code(tmp_path):
    """(Python that leaves a file, whether it ran)."""
    marker = tmp_path / "it-ran"
    return f"open({str(marker)!r}, 'w').close()\n", marker.exists


@pytest.mark.parametrize("tag", ["!!python/object/apply:builtins.exec", "!!python/object/new:builtins.exec", "!!python/name:builtins.exec"])
def test_a_tag_of_yaml_makes_no_object(tag, code, tmp_path):
    source, ran = code
    path = tmp_path / "a.yaml"
    path.write_text(f"model: {tag} [{json.dumps(source)}]\n")
    for read in (load, read_yaml):
        with pytest.raises(UserError, match=r"a\.yaml, line 1: not valid YAML: could not determine a constructor for the tag"):
            read(path)
    assert not ran()


def test_a_model_s_own_code_is_not_run(code, tmp_path):
    source, ran = code
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "assets/tiny-mixtral", folder)
    for name in ("configuration_own", "modeling_own", "tokenization_own"):
        (folder / f"{name}.py").write_text(f"{source}class Own: ...\n")
    for name, kinds in (
        ("config.json", {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_own.Own", "tokenization_own.Own"]}),
    ):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"auto_map": kinds, "trust_remote_code": True, "tokenizer_class": "Own"}))
    with pytest.raises(UserError, match=r"auto_map = "):
        read_config(folder)
    assert load_tokenizer(str(folder)).eos_token == "</s>"
    assert not ran()


def test_a_repository_s_own_tokenizer_is_not_run(code, tmp_path, monkeypatch):
    """Of the Hub, in its cache: without a question to anyone who sits at the terminal, too."""
    from huggingface_hub import constants

    source, ran = code
    sha, repo = "a" * 40, tmp_path / "models--org--name"
    folder = repo / "snapshots" / sha
    folder.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(sha)
    (folder / "tokenization_own.py").write_text(f"{source}class Own: ...\n")
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("builtins.input", lambda text="": pytest.fail(f"it asked: {text}"))
    with pytest.raises(UserError, match=r"tokenizer 'org/name' could not be loaded \(ValueError: .*custom code"):
        load_tokenizer("org/name")
    assert not ran()


def test_a_data_set_s_script_is_not_run(code, tmp_path, monkeypatch):
    source, ran = code
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.py").write_text(source)
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: data.py\n---\n")
    with pytest.raises(UserError):
        places.read(str(folder), None, "train", "data.source")
    for name in (folder, folder / "data.py"):
        with pytest.raises(UserError, match=r"could not load it|Dataset scripts are no longer supported"):
            places.from_datasets(str(name), None, "train", "data.source")
    assert not ran()


def test_a_file_that_unpacks_to_more_than_text_does(tmp_path, monkeypatch):
    monkeypatch.setattr(compression, "LARGEST", 1 << 10)
    packed = gzip.compress(b"0" * (1 << 20))
    with pytest.raises(UserError, match=r"a\.json\.gz \(gzip\) unpacks to more than .* over 100 times its own size"):
        compression.unpacked("a.json.gz", packed)
    assert compression.unpacked("a", gzip.compress(b"0" * 1000)) == b"0" * 1000
    monkeypatch.setattr(windows, "BYTES", 1 << 12)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": "' + b"0" * (1 << 20)))
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: a record of more than 1,024 bytes"):
        list(windows.windows(str(path)))


@pytest.mark.parametrize(
    "header",
    [
        (2**63).to_bytes(8, "little") + b"{}",
        (200 << 20).to_bytes(8, "little") + b"{}",
        {"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [2**63, 2**63 + 4]}},
        {f"{i}": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for i in range(1000)},  # all in one place
    ],
)
def test_an_absurd_header(header, tmp_path):
    path = tmp_path / "model.safetensors"
    encoded = json.dumps(header).encode() if isinstance(header, dict) else b""
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + b"\0" * 4 if encoded else header)
    with pytest.raises(UserError, match=r"model\.safetensors is no whole safetensors file"):
        Reader(path)


# --- who may reach what we start ---

SERVER = re.compile(r"\b(create_server|bind|start_server|start_unix_server|\w*(HTTP|TCP|UDP)Server)\(")


def test_nothing_here_listens():
    """But jax's coordinator of several processes, below: no module makes a server, and no page tells to listen to every network."""
    for folder in ("moejax", "models", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not SERVER.search(path.read_text()), path
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*.ipynb")]:
        for told in ("0.0.0.0", "--bind_all"):
            assert told not in page.read_text(), page


@pytest.mark.parametrize(("coordinator", "bound"), [("127.0.0.1:1", "127.0.0.1:1"), ("localhost:1", "localhost:1"), ("gpu1:1", None)])
def test_processes_of_one_machine_meet_on_it_alone(coordinator, bound, monkeypatch):
    given = {}
    monkeypatch.setattr(processes, "_at_abort", lambda message: None)
    monkeypatch.setattr("jax.distributed.initialize", lambda **options: given.update(options))
    monkeypatch.setattr("jax.config.update", lambda *_: None)
    processes._meet(load(ROOT / "configs/demo.yaml", [f"mesh.coordinator={coordinator}", "mesh.processes=2", "mesh.process_id=0"]).mesh)
    assert given.get("coordinator_bind_address") == bound
