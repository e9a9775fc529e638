"""`moejax doctor`: every finding that is not ok says what to do."""

import http.server
import socket
import threading
from types import SimpleNamespace

import pytest

from moejax import cli
from moejax.commands import doctor


@pytest.fixture
def closed_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_the_table(monkeypatch, capsys, closed_port):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port}")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for part in ("Python", "jaxlib", "(cpu)", "host memory", "compiled programs", "Hub downloads", "cannot be reached", "HF_ENDPOINT"):
        assert part in out


def test_what_is_wrong_comes_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "version", lambda name: {"flax": None, "jax-cuda12-plugin": "0.9", "xprof": None}.get(name, "0.10"))
    findings = [*doctor.versions(), *doctor.plugin()]
    assert [f.what for f in findings if f.status == "error"] == ["packages", "CUDA plugin"]
    assert "lacking: flax" in findings[1].advice and "jax[cuda12]==" in findings[2].advice
    (tmp_path / "file").write_text("")
    blocked = doctor.folder_finding("runs", tmp_path / "file" / "runs", "runs_dir=DIR")
    assert blocked.status == "error" and "runs_dir=DIR" in blocked.advice
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=1e9))
    assert doctor.folder_finding("runs", tmp_path / "new", "runs_dir=DIR").status == "note"
    monkeypatch.setattr(doctor, "has_nvidia", lambda: True)
    assert "-m pip install 'jax[cuda12]==" in next(iter(doctor.devices())).advice
    monkeypatch.setattr(doctor, "versions", lambda: findings)
    monkeypatch.setattr(doctor, "hub", lambda: doctor.Finding("Hub", "ok", ""))
    assert doctor.run(None) == 1
    assert all(f.advice for f in findings if f.status != "ok")


def test_the_hub(monkeypatch, closed_port):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(int(self.path.strip("/") or 200))
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    try:
        for endpoint, status in ((address, "ok"), (f"{address}/403", "ok"), (f"{address}/503", "note"), ("no-url", "note")):
            monkeypatch.setenv("HF_ENDPOINT", endpoint)
            assert doctor.hub().status == status, endpoint
    finally:
        server.shutdown()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in doctor.hub().found
