"""Hub ids: what is cached, pinned, downloaded with a token, or not there. No hub is asked; a local server plays one."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from huggingface_hub import errors
from support import ROOT

from moejax import config
from moejax.errors import UserError
from moejax.hub import snapshot
from moejax.runs import folders, pinning
from moejax.training import loop

SHA, NEWER = "a" * 40, "b" * 40
ID = "org/name"
CHILD = """
import sys
from moejax.errors import UserError
from moejax.hub import snapshot
try:
    folder = snapshot.resolve(*sys.argv[1:])
    print(folder, snapshot.commit(sys.argv[1], folder))
except UserError as error:
    print("refused:", error)
"""


def cached(cache, sha=SHA, source=ROOT / "assets/tiny-mixtral"):
    """The Hub's cache as huggingface_hub lays it out, with one snapshot that branch main points to."""
    repo = cache / "models--org--name"
    snapshots = repo / "snapshots" / sha
    snapshots.mkdir(parents=True)
    for path in source.iterdir():
        (snapshots / path.name).symlink_to(path)
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / "main").write_text(sha)
    return snapshots


def resolved(cache, *arguments, **environment):
    """What a process of its own says, as huggingface_hub reads its variables when it is imported."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    out = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], env=clean | {"HF_HUB_CACHE": str(cache), "PYTHONPATH": str(ROOT)} | environment,
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return out.stdout.strip()


def test_offline_finds_the_cache_and_says_what_it_lacks(tmp_path):
    folder = cached(tmp_path)
    assert resolved(tmp_path, ID, HF_HUB_OFFLINE="1") == f"{folder} {SHA}"
    assert resolved(tmp_path, f"{ID}@{SHA}", HF_HUB_OFFLINE="1") == f"{folder} {SHA}"
    said = resolved(tmp_path, ID, NEWER, HF_HUB_OFFLINE="1")
    assert said.startswith("refused: model.source = 'org/name' is no local folder, looked for from ")
    assert f", and HF_HUB_OFFLINE is set: {tmp_path} has no whole" in said
    assert f"at revision '{NEWER}'. Unset HF_HUB_OFFLINE to download it" in said


def test_without_a_network(tmp_path):
    said = resolved(tmp_path, ID, HF_ENDPOINT="http://127.0.0.1:9")
    assert f"{tmp_path} has no whole copy of it, and the Hub (http://127.0.0.1:9) could not be reached: check the network" in said
    folder = cached(tmp_path)
    assert resolved(tmp_path, ID, HF_ENDPOINT="http://127.0.0.1:9") == f"{folder} {SHA}"  # what is cached serves


def oid(content):
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


class _Hub(BaseHTTPRequestHandler):
    """A gated repository of one commit. It answers who brings the token."""

    files = {"config.json": b"{}", "model.safetensors": b"weights"}  # noqa: RUF012

    def do_GET(self):
        found = self.headers.get("Authorization") == "Bearer secret"
        if not found:
            self.answer(401, b"{}", {"X-Error-Code": "GatedRepo"})
        elif self.path.startswith("/api/models/org/name/tree/"):
            tree = [{"type": "file", "path": name, "size": len(content), "oid": oid(content)} for name, content in self.files.items()]
            self.answer(200, json.dumps(tree).encode())
        elif self.path.startswith("/api/models/org/name/revision/other"):
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif self.path.startswith("/api/models/org/name"):
            listing = [{"rfilename": name} for name in self.files]
            self.answer(200, json.dumps({"id": ID, "sha": SHA, "siblings": listing}).encode())
        else:
            content = self.files[self.path.rpartition("/")[2]]
            self.answer(200, content, {"ETag": f'"{oid(content)}"', "X-Repo-Commit": SHA})

    do_HEAD = do_GET

    def answer(self, code, content, headers=()):
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), "Content-Type": "application/json", **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_shards_of_bin_are_downloaded_where_there_is_nothing_else(hub, tmp_path, monkeypatch):
    files = {"config.json": b"{}", "pytorch_model.bin.index.json": b"{}", "pytorch_model-00001-of-00001.bin": b"w", "optimizer.bin": b"o"}
    monkeypatch.setattr(_Hub, "files", files)
    said = resolved(tmp_path, ID, HF_ENDPOINT=hub, HF_TOKEN="secret")
    folder = tmp_path / "models--org--name" / "snapshots" / SHA
    assert said == f"{folder} {SHA}" and {path.name for path in folder.iterdir()} == files.keys() - {"optimizer.bin"}


def test_a_token_opens_what_is_gated(hub, tmp_path):
    said = resolved(tmp_path, ID, HF_ENDPOINT=hub)
    assert "the Hub shows no such repository: check the id; a private or gated one needs HF_TOKEN" in said
    assert "the token of HF_TOKEN may not read it" in resolved(tmp_path, ID, HF_ENDPOINT=hub, HF_TOKEN="wrong")
    folder = tmp_path / "models--org--name" / "snapshots" / SHA
    assert resolved(tmp_path, ID, HF_ENDPOINT=hub, HF_TOKEN="secret") == f"{folder} {SHA}"
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert "the Hub has no revision 'other' of it" in resolved(tmp_path, ID, "other", HF_ENDPOINT=hub, HF_TOKEN="secret")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """This process's huggingface_hub, offline, with a cache of its own."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def experiment(tmp_path, **changes):
    content = {
        "name": "run",
        "runs_dir": str(tmp_path / "runs"),
        "model": {"source": ID},
        "quantization": {"format": "nf4"},
        "adapter": {"rank": 2, "targets": ["gate"]},
        "data": {"batching": "fixed", "row_tokens": 16, "batch_rows": 2},
        "training": {"steps": 1, "compute_dtype": "float32"},
    }
    return config.Experiment.model_validate(content | changes)


def test_a_run_is_pinned_to_the_commit_it_took(offline, tmp_path):
    cached(offline)
    assert loop.run(experiment(tmp_path), resume=False) == 0
    written = tmp_path / "runs" / "run" / "config.yaml"
    again = config.load(written)
    assert again.model.revision == SHA and again.model.source == ID
    assert json.loads((tmp_path / "runs/run/adapter/adapter_config.json").read_text())["revision"] == SHA
    # The branch moves on to something that is no model. A rerun, a resumed run and the adapter's readers keep to the commit.
    cached(offline, NEWER, ROOT / "docs")
    assert snapshot.resolve(ID).name == NEWER
    assert loop.run(experiment(tmp_path), resume=True) == 0
    assert loop.run(config.load(written, ["name=again"]), resume=False) == 0
    assert config.load(tmp_path / "runs" / "again" / "config.yaml").model.revision == SHA
    other = experiment(tmp_path, model={"source": ID, "revision": NEWER})
    with pytest.raises(UserError, match=r"Changed: model\.revision: 'a+' -> 'b+'"):
        loop.run(other, resume=True)


def test_a_branch_in_the_id_is_pinned_too(offline, tmp_path):
    """`org/name@main`: the commit of today, also where the id itself named the branch."""
    cached(offline)
    named = experiment(tmp_path, model={"source": f"{ID}@main"})
    again = pinning.pinned(named, snapshot.resolve(named.model.source, named.model.revision))
    assert (again.model.source, again.model.revision) == (ID, SHA)
    cached(offline, NEWER, ROOT / "docs")
    assert snapshot.resolve(again.model.source, again.model.revision).name == SHA
    folders.write_config(again)
    assert pinning.adopted(named).model == again.model
    for other in ({"source": f"{ID}@{NEWER}"}, {"source": "org/other@main"}):
        begun = experiment(tmp_path, model=other)
        assert pinning.adopted(begun) == begun


def test_an_adapter_to_continue_from_is_pinned_too(offline, tmp_path):
    cached(offline)
    base = ROOT / "assets/tiny-mixtral"
    begun = experiment(tmp_path, adapter={"rank": 2, "targets": ["gate"], "init_from": ID}, model={"source": str(base)})
    pinned = pinning.pinned(begun, base)
    assert pinned.adapter.init_from == f"{ID}@{SHA}" and pinned.model.revision is None
    assert pinning.adopted(begun) == begun
    folder = tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.dump(pinned))
    assert pinning.adopted(begun) == pinned


def test_what_the_data_decided_is_kept(offline, tmp_path):
    """The template of conversations, and the day that it takes for today: a run that is resumed tomorrow renders the same."""
    begun = experiment(tmp_path, model={"source": str(ROOT / "assets/tiny-mixtral")})
    begun = begun.changed("data", template=None)
    folders.write_config(begun.changed("data", template="chat", template_date="2026-03-09"))
    resumed = pinning.adopted(begun).data
    assert (resumed.template, resumed.template_date) == ("chat", "2026-03-09")
    assert pinning.adopted(begun.changed("data", template="mistral")).data.template == "mistral", "and folders.prepare refuses it"


@pytest.mark.parametrize(("status", "asked", "direct"), [(503, 3, True), (503, 3, False), (404, 1, True), (404, 1, False)])
def test_a_server_s_error_is_waited_for_a_few_times(status, asked, direct, tmp_path, monkeypatch):
    """Also the one before a download, which huggingface_hub reports as the cause of an error of its own."""
    came = []

    def down(*_, **__):
        came.append(status)
        answered = RuntimeError("of the server")
        answered.response = SimpleNamespace(status_code=status)
        if direct:
            raise answered
        raise errors.LocalEntryNotFoundError("not in the cache") from answered

    monkeypatch.setattr("huggingface_hub.hf_hub_download", down)
    monkeypatch.setattr(snapshot, "_WAITS", (0.0, 0.0))
    with pytest.raises(UserError, match=r"a\.safetensors of org/name at .* could not be fetched .*start again"):
        snapshot.fetch_file("org/name", "a" * 40, "a.safetensors", tmp_path)
    assert len(came) == asked
