"""A run's folder belongs to one process at a time: claimed before anything expensive, by a lock that a dead process does not hold."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moejax.errors import UserError
from moejax.files import process_runs

LOCK = "run.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # some network file systems


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold `folder` (made where it is not there) until the end of the block. Folders made here that are then empty are removed again.

    Raises UserError, naming process and host, where another process holds it, and where it cannot be written to.
    """
    made: list[Path] = []
    held: int | None = None
    try:
        try:
            held = _lock(folder, made)
        except OSError as error:
            raise UserError(
                f"{folder}: a run cannot be kept there ({error.filename or folder}: {error.strerror}): choose a folder that can be "
                "written to (runs_dir=…)"
            ) from None
        yield
    finally:
        if held is not None:
            (folder / LOCK).unlink(missing_ok=True)  # while it is held: anyone who opened it meanwhile sees that it is gone
            os.close(held)
        for path in reversed(made):
            with suppress(OSError):
                path.rmdir()


def _lock(folder: Path, made: list[Path]) -> int:
    """An open file of `folder` that this process alone holds."""
    path = folder / LOCK
    while True:
        _make(folder, made)
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # another start failed, and removed the folder
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = _holder(file)
            os.close(file)
            raise UserError(_taken(folder, who)) from None
        except OSError as error:
            who = _holder(file)
            if error.errno not in _NO_LOCKS or _lives(who):
                os.close(file)
                if error.errno not in _NO_LOCKS:
                    raise
                raise UserError(f"{_taken(folder, who)}. If it runs no longer, remove {path}") from None
        if path.exists() and os.fstat(file).st_ino == path.stat().st_ino:
            try:
                os.ftruncate(file, 0)
                os.pwrite(file, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
            except OSError as error:  # the disk is full
                path.unlink(missing_ok=True)
                os.close(file)
                error.filename = str(path)
                raise
            return file
        os.close(file)  # its holder ended, and removed it, between the two calls


def _make(folder: Path, made: list[Path]) -> None:
    """mkdir -p that remembers what it made."""
    for path in [*reversed(folder.parents), folder]:
        if not path.is_dir():
            with suppress(FileExistsError):
                path.mkdir()
                made.append(path)
            if not path.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))


def _holder(file: int) -> tuple[str, str]:
    """(process, host) as the holder wrote them; empty strings before it did."""
    words = os.pread(file, 300, 0).decode(errors="replace").split()
    return (words[0], words[1]) if len(words) == 2 else ("", "")


def _lives(who: tuple[str, str]) -> bool:
    """Whether a holder may still be at work; of another host's processes nothing is known here."""
    process, host = who
    return bool(process) and (host != socket.gethostname() or not process.isdigit() or process_runs(int(process)))


def _taken(folder: Path, who: tuple[str, str]) -> str:
    process, host = who
    name = f"process {process} on {host}" if process else "another process"
    return f"{folder} is in use: {name} runs in it. Wait for its end or stop it, or choose another name=… (nothing was changed)"
