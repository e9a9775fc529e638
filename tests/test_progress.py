"""What is told to somebody who waits."""

import io
import time

import pytest

from moejax import progress
from moejax.terminal import Console


@pytest.mark.parametrize("long", [True, False])
def test_a_line_when_it_takes_long_and_its_end(long, monkeypatch):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.01 if long else 60)
    out = io.StringIO()
    with progress.waiting(Console(file=out), "reading [/b]"):
        time.sleep(0.3 if long else 0)
    assert out.getvalue() == ("reading [/b] …\nreading [/b]: 0 s\n" if long else "")


def test_within_something_that_moves_already(monkeypatch):
    """As the bar of a training run does on a terminal."""
    console = Console(file=io.StringIO(), force_terminal=True)
    with console.status("outer"), progress.waiting(console, "inner [/b]"), progress.waiting(console, "innermost"):
        pass
