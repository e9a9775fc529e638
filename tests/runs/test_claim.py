"""A run's folder has one owner."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest
from support import ROOT

from moejax.errors import UserError
from moejax.runs.claim import LOCK, claimed

HOLD = """
import pathlib, sys, time
from moejax.runs.claim import claimed
with claimed(pathlib.Path(sys.argv[1])):
    print(flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path/runs/run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "runs/run")], env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE
    )
    assert process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_by_name_and_a_dead_one_holds_nothing(holder, tmp_path):
    folder = tmp_path / "runs/run"
    with pytest.raises(UserError, match=rf"run is in use: process {holder.pid} on .* runs in it"), claimed(folder):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (folder / LOCK).exists()
    with claimed(folder):
        assert (folder / LOCK).read_text().split()[0] == str(os.getpid())
        with pytest.raises(UserError, match=f"process {os.getpid()} "), claimed(folder):
            pass
    assert not (folder / LOCK).exists()


def test_a_start_that_failed_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), claimed(tmp_path / "runs/a/b"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with claimed(tmp_path / "runs/a"):
        (tmp_path / "runs/a/config.yaml").write_text("")
    assert [p.name for p in (tmp_path / "runs/a").iterdir()] == ["config.yaml"]


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run: a run cannot be kept there .*Not a directory.*runs_dir=…"):  # noqa: SIM117
        with claimed(tmp_path / "file/run"):
            pass


def test_a_file_system_without_locks(monkeypatch, tmp_path):
    """The file alone then says who holds the folder: a process of this host that is gone does not."""

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    refused = pytest.raises(UserError, match=rf"process {os.getpid()} .* If it runs no longer, remove .*{LOCK}")
    with claimed(tmp_path), refused, claimed(tmp_path):
        pass
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / LOCK).write_text(f"{ended.pid} {os.uname().nodename}\n")
    with claimed(tmp_path):
        pass
    (tmp_path / LOCK).write_text("1 elsewhere\n")
    with pytest.raises(UserError, match="process 1 on elsewhere"), claimed(tmp_path):
        pass
