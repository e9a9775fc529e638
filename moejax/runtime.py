"""What jax reads when it is imported, and its folder of compiled programs. What another version, device or program left there has another
name, and is not found.

An entry that cannot be read (a run was killed while jax wrote it) jax compiles again, with a warning, but does not write again: every later
start would compile too. Here such entries are removed, and so written again.
"""

from __future__ import annotations

import builtins
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

from moejax import compiler_options, libtpu
from moejax.config import DeviceConfig, load
from moejax.device import host_bytes
from moejax.errors import UserError

_UNWRITABLE = "Error writing persistent compilation cache entry"
_UNREADABLE = re.compile(r"Error reading persistent compilation cache entry for '([^']+)'(?:: (\w+): .*)?")


def replace_unreadable(folder: Path) -> None:
    """From here on in this process; of a folder that cannot be used, that is reported once.

    Entries of one function are distinguished by hashes alone, so all of that function's go."""
    plain, told = warnings.showwarning, set[str]()

    def show(message: Warning | str, *where: Any, **more: Any) -> None:
        unreadable = _UNREADABLE.match(str(message))
        kind = getattr(builtins, (unreadable and unreadable[2]) or "", None)
        if str(message).startswith(_UNWRITABLE) or (isinstance(kind, type) and issubclass(kind, OSError)):
            if not told:  # one of them for each program would follow
                told.add(_UNWRITABLE)
                reason = str(message).partition("': ")[2]
                print(f"warning: {folder}: compiled programs are not kept for the next start: {reason}", file=sys.stderr)
            return
        if unreadable is None:
            plain(message, *where, **more)
            return
        for entry in folder.glob("*-cache"):
            if entry.name.startswith(f"{unreadable[1]}-"):
                entry.unlink(missing_ok=True)
        print(f"{folder}: a compiled program of {unreadable[1]} cannot be read (cut off?): compiled anew", file=sys.stderr)

    warnings.showwarning = show


def prepare_jax(device: DeviceConfig) -> None:
    """jax's settings, which it reads when it is imported. What the environment sets wins. Raises UserError for a TPU that it cannot use."""
    libtpu.check()
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", str(device.memory_fraction))
    if (memory := host_bytes()) is not None:  # of pinned memory a GPU's client would take 64 GB at most, whatever there is
        os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", str(memory[0] // 2**30))
    if device.compilation_cache is not None:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(device.compilation_cache).expanduser()))
        # jax leaves out what compiles in less than a second: most of what a start compiles, but for the step.
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        replace_unreadable(Path(os.environ["JAX_COMPILATION_CACHE_DIR"]))
    compiler_options.settle()


def prepare_jax_for(run: str) -> None:
    """As the config of a run's folder says; by default where there is none to read: the command itself says what is wrong."""
    try:
        device = load(Path(run) / "config.yaml").device
    except UserError:
        device = DeviceConfig()
    prepare_jax(device)
