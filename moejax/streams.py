"""Standard output and error, whatever they lead to: an old encoding, a reader that goes away, nothing."""

from __future__ import annotations

import atexit
import os
import sys
from pathlib import Path
from typing import Any

_at_exit: list[Any] = []


def prepare() -> None:
    """Let standard output take every character: what its encoding lacks becomes `?`. Call it first in every command."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by anyone who started this process
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 (for as long as the process)
        elif hasattr(stream, "reconfigure") and stream.errors != "backslashreplace":  # as standard error is from the start
            stream.reconfigure(errors="replace")
    if not _at_exit:
        _at_exit.append(atexit.register(silence))


def silence() -> None:
    """Send to nowhere what standard output and error still hold for a reader that is gone."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
        except (OSError, ValueError):  # a full disk, or closed: anyone who wrote has been reported
            continue
