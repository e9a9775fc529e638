"""Whoever waits for more than a moment is told for what."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.errors import LiveError
from rich.markup import escape

from moejax.terminal import Console

QUIET_SECONDS = 5.0


@contextmanager
def waiting(console: Console, what: str) -> Iterator[None]:
    """Tell what is being done: at once and with a spinner on a terminal; elsewhere a line when it takes longer than 5 s, and its end."""
    spinner = console.status(escape(what)) if console.is_terminal else None
    try:
        if spinner is not None:
            spinner.start()
    except LiveError:  # something else is moving there already
        spinner = None
    start, told = time.monotonic(), threading.Event()

    def tell() -> None:
        told.set()
        console.print(f"{what} …", soft_wrap=True)

    timer = threading.Timer(QUIET_SECONDS, tell)
    timer.daemon = True
    if spinner is None:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if spinner is not None:
            spinner.stop()
    if told.is_set():
        console.print(f"{what}: {time.monotonic() - start:.0f} s", soft_wrap=True)
