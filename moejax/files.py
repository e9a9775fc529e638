"""Files that are replaced whole or not at all: written beside their place under a name that no other writer has, then renamed."""

from __future__ import annotations

import os
import re
import socket
from itertools import count
from pathlib import Path

_NUMBERS = count()  # next() is atomic: two threads get two


def aside(path: Path) -> Path:
    """A file beside `path` that only this call's writer writes: NAME.HOST-PID-NUMBER.tmp. The caller renames or removes it.

    Those that writers of the same file left behind when they were killed on this machine are removed.
    """
    here = re.escape(f"{path.name}.{socket.gethostname()}-")
    for other in path.parent.glob("*.tmp"):
        left = re.fullmatch(rf"{here}(\d+)-\d+\.tmp", other.name)
        if left and not _runs(int(left[1])):
            other.unlink(missing_ok=True)
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}-{next(_NUMBERS)}.tmp")


def replace_text(path: Path, text: str) -> None:
    """Write UTF-8 text, in place of what was there. A failure (OSError) leaves the old file and nothing beside it."""
    new = aside(path)
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
