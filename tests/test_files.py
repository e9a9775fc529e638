"""Files that are replaced whole or not at all."""

import errno
import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from support import ROOT

from moejax import files


def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "a.json"
    files.replace_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        files.replace_text(path, "new \ud800")
    with pytest.raises(RuntimeError), files.replacing(path) as new:
        new.write_bytes(b"half")
        raise RuntimeError
    with pytest.raises(FileNotFoundError):
        files.replace_text(tmp_path / "nowhere" / "b", "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    files.replace_text(path, "é\n", newline="\r\n")
    assert path.read_bytes() == b"\xc3\xa9\r\n" and list(tmp_path.iterdir()) == [path]


def test_the_bytes_are_on_the_disk_before_the_name(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda number: done.append(Path(f"/proc/self/fd/{number}").readlink()))
    with files.replacing(tmp_path / "a") as new:
        new.write_bytes(b"1")
    assert done == [new]


def test_two_writers_share_no_file_and_the_dead_one_is_cleaned_up(tmp_path):
    path = tmp_path / "a"
    ours = files.aside(path)
    assert ours != files.aside(path)
    ours.write_bytes(b"")
    child = multiprocessing.get_context("spawn").Process(target=_killed, args=(path,))
    child.start()
    child.join()
    other = tmp_path / "b.elsewhere-1-0.tmp"
    other.write_bytes(b"")
    assert child.exitcode == 3 and len(list(tmp_path.iterdir())) == 4
    files.replace_text(path, "")
    assert set(tmp_path.iterdir()) == {path, ours, other}


def _killed(path):
    files.aside(path).write_bytes(b"half")
    folder = files.aside(path)
    folder.mkdir()
    (folder / "b").write_bytes(b"half")
    os._exit(3)


def test_nobody_names_a_file_aside_by_hand():
    """`files` names them: other names are shared by two writers, and stay after a writer that was killed."""
    found = {p.relative_to(ROOT).as_posix() for p in (ROOT / "moejax").rglob("*.py") if '.tmp"' in p.read_text(encoding="utf-8")}
    assert found == {"moejax/files.py"}


def test_a_full_disk_names_the_file(tmp_path):
    """The kernel says no name where a write fails."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match=r"a\.png") as caught:
        files.save_figure(SimpleNamespace(savefig=Mock(side_effect=full)), tmp_path / "a.png", dpi=1)
    assert caught.value.filename == str(tmp_path / "a.png") and not list(tmp_path.iterdir())


def test_a_name_that_is_close_to_a_missing_one(tmp_path):
    (tmp_path / "chats.jsonl").touch()
    assert files.meant(tmp_path / "chat.jsonl") == f"; did you mean {tmp_path / 'chats.jsonl'}?"
    (tmp_path / "lost.jsonl").symlink_to(tmp_path / "nowhere")
    assert not files.meant(tmp_path / "lost.jsonl"), "a link that leads nowhere is not its own correction"
    assert not files.meant(tmp_path / "nowhere" / "a") and not files.meant(tmp_path / "\0" / "a")
