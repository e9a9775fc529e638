"""Files that are replaced whole or not at all: written next to their place under a name that no other writer has, then renamed.

What is renamed is on the disk before it: a machine that stops leaves the old file or the new one, not the new name with half a content.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any


def meant(path: Path) -> str:
    """`; did you mean NAME?` of what lies next to a path that does not exist, by its name; nothing where nothing is close. Not a link of
    that name, which leads nowhere. A common suffix makes no two names close."""
    try:
        names = [there.name for there in path.parent.iterdir() if there.name != path.name]
        names = [name for name in names if difflib.get_close_matches(path.stem, [Path(name).stem], cutoff=0.7)]
    except (OSError, ValueError):
        return ""
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.7)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def cache_folder() -> Path:
    """Where what was compiled or tried is remembered: $MOEJAX_CACHE, or ~/.cache/moejax."""
    return Path(os.environ.get("MOEJAX_CACHE") or Path.home() / ".cache" / "moejax")


_NUMBERS = count()  # next() is atomic: two threads get two


def aside(path: Path) -> Path:
    """A file or folder next to `path` that only this call's writer writes: NAME.HOST-PID-NUMBER.tmp. The caller removes or renames it.

    Those that writers of the same one left behind when they were killed on this machine are removed.
    """
    here = re.escape(f"{path.name}.{socket.gethostname()}-")
    for other in path.parent.glob("*.tmp"):
        left = re.fullmatch(rf"{here}(\d+)-\d+\.tmp", other.name)
        if left and not process_runs(int(left[1])):
            shutil.rmtree(other) if other.is_dir() else other.unlink(missing_ok=True)
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}-{next(_NUMBERS)}.tmp")


def settle(new: Path, path: Path) -> None:
    """Rename a closed file to `path`, in place of what was there, once its bytes are on the disk. Raises OSError."""
    with new.open("rb") as file:
        os.fsync(file.fileno())
    new.replace(path)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; what is there at the end of the block replaces `path`. A failure leaves the old file and nothing next to it.

    An OSError that names no file (a full disk's), or the one that was written to, names `path` then.
    """
    new = aside(path)
    try:
        yield new
        settle(new, path)
    except OSError as error:
        if error.filename in (None, str(new)):
            error.filename = str(path)
        raise
    finally:
        new.unlink(missing_ok=True)


def replace_text(path: Path, text: str, *, newline: str | None = None) -> None:
    """Write UTF-8 text, in place of what was there. A failure (OSError) leaves the old file and nothing next to it."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8", newline=newline)


def nearest(folder: Path) -> Path:
    """`folder`, or the nearest one above it that is there."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    return there


def save_figure(figure: Any, path: Path, **how: Any) -> None:
    """Draw a figure of matplotlib's into a .png, .svg or .pdf, in place of what was there. Raises OSError as `replacing` does."""
    with replacing(path) as new:
        figure.savefig(new, format=path.suffix.lower().removeprefix("."), **how)


def lfs_pointer(path: Path) -> str | None:
    """What to say of a file that is Git LFS' note of where the file is, as a clone without LFS has it; None for any other."""
    try:
        with path.open("rb") as file:
            pointer = file.read(64).startswith(b"version https://git-lfs.github.com/spec/")
    except OSError:
        return None
    return "is a Git LFS pointer, and not the file: run `git lfs pull` where it was cloned, or download the file" if pointer else None


def process_runs(pid: int) -> bool:
    """Whether a process of that number is there on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
