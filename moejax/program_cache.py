"""jax's folder of compiled programs. What another version, device or program left there has another name, and is not found.

An entry that cannot be read (a run was killed while jax wrote it) jax compiles anew, with a warning, but does not write again: every later
start would compile too. Here such entries are removed, and so written again.
"""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path
from typing import Any

_UNREADABLE = re.compile(r"Error reading persistent compilation cache entry for '([^']+)'")


def replace_unreadable(folder: Path) -> None:
    """From here on in this process. Entries of one function are told apart by hashes alone, so all of that function's go."""
    plain = warnings.showwarning

    def show(message: Warning | str, *where: Any, **more: Any) -> None:
        unreadable = _UNREADABLE.match(str(message))
        if unreadable is None:
            plain(message, *where, **more)
            return
        for entry in folder.glob("*-cache"):
            if entry.name.startswith(f"{unreadable[1]}-"):
                entry.unlink(missing_ok=True)
        print(f"{folder}: a compiled program of {unreadable[1]} cannot be read (cut off?): compiled anew", file=sys.stderr)

    warnings.showwarning = show
