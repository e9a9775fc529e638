"""What every result in benchmarks/results begins with, and how it is written. No jax here."""

from __future__ import annotations

import functools
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from moejax.errors import UserError
from moejax.files import replace_text

RANDOM = [
    "model.source=null", "data.source=null", "data.records=null", "data.bytes=null", "data.sha256=null", "data.batching=fixed",
    "training.steps=1000000", "training.epochs=null", "checkpoint.every=null",
]  # fmt: skip
"""Overrides: weights and tokens are random, one query fills a row."""


def of_rows(rows: int, length: int) -> list[str]:
    """Overrides: a batch of this many rows and tokens of each."""
    return [f"data.batch_rows={rows}", f"data.row_tokens={length}", f"data.max_length={length}"]


def refusing(main: Callable[[], int]) -> Callable[[], int]:
    """`main`, with a mistake of the user's told in one message: exit code 2."""

    @functools.wraps(main)
    def guarded() -> int:
        try:
            return main()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return guarded


def about(command: str | None = None, **more: Any) -> dict[str, Any]:
    """Command (default: this process's), date, versions; then `more`."""
    script = f"benchmarks/{Path(sys.argv[0]).name}"
    return {
        "command": command or " ".join(["python", script, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"jax": version("jax"), "python": platform.python_version()},
    } | more


def write(path: Path | None, report: dict[str, Any]) -> None:
    """Into `path`, whole or not at all; nowhere for None."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(report, indent=1) + "\n")


def device(environment: dict[str, str] | None = None) -> tuple[str, str]:
    """(platform, kind) of the first device that jax finds, asked in a process of its own: this one takes none of its memory."""
    code = "import jax; d = jax.local_devices()[0]; print(d.platform, d.device_kind, sep='|')"
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    found, _, kind = (said.stdout.strip().splitlines() or ["none|"])[-1].partition("|")
    return found, kind
