"""What the rooms tell, as somebody who waits sees it."""

import io
import time

import pytest

from moejax import progress
from moejax.commands import shown
from moejax.commands.shown import Shown
from moejax.progress import Table
from moejax.terminal import Console

RECORD = {"loss": 2.5, "queries_per_second": 3.0, "tokens_per_second": 100.0, "learning_rate": 1e-4}


def showing(**settings):
    """(what shows it, its output and what is next to it)."""
    listener, out, beside = Shown(), io.StringIO(), io.StringIO()
    listener.__dict__ |= {"out": Console(file=out, width=60, **settings), "beside": Console(file=beside, **settings)}
    return listener, out, beside


@pytest.mark.parametrize("long", [True, False])
def test_a_line_when_it_takes_long_and_its_end(long, monkeypatch):
    monkeypatch.setattr(shown, "QUIET_SECONDS", 0.01 if long else 60)
    listener, out, _ = showing()
    with listener.waiting("reading [/b]"):
        time.sleep(0.3 if long else 0)
    assert out.getvalue() == ("reading [/b] …\nreading [/b]: 0 s\n" if long else "")


def test_within_something_that_moves_already():
    """As the bar of a training run does on a terminal."""
    listener, *_ = showing(force_terminal=True)
    with listener.steps(3, 0) as show, listener.waiting("inner [/b]"), listener.waiting("innermost"):
        show(1, RECORD)


def test_results_stand_in_the_output_and_the_rest_beside_them():
    listener, out, beside = showing()
    listener.note("a note")
    listener.say("a line that is longer than the sixty characters of this terminal: no word is cut")
    listener.say(Table([("a", "1"), None, ("sum [/b]", "10")], ("what", "number"), (1,), "title"))
    with listener.bar("merging", 10, "bytes") as advance:
        advance(10)
    lines = out.getvalue().splitlines()
    assert beside.getvalue().startswith("a note\n") and lines[0].endswith("no word is cut") and lines[1].rstrip() == "title"
    assert "│ a        │      1 │" in lines and "│ sum [/b] │     10 │" in lines


def test_steps_in_lines_the_first_some_between_and_the_last():
    listener, out, _ = showing()
    with listener.steps(100, 4) as show:
        for step in range(5, 101):
            show(step, RECORD)
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [f"{n}/100" for n in range(5, 101, 5)]
    assert lines[0] == "step 5/100  loss 2.5000  3.00 queries/s  100 tokens/s  lr 1.00e-04  left ?"


def test_without_a_listener_results_are_silent(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_heard_by", [progress.Listener()])
    progress.say("a line", Table([("a",)]))
    with progress.waiting("it"), progress.bar("it", 3, "layers") as advance, progress.steps(3, 0) as show:
        advance(1)
        show(1, RECORD)
    assert capsys.readouterr() == ("", "")


def test_without_a_command_a_warning_is_pythons(monkeypatch):
    """As `hub.load` in a notebook has it: a cache that is made again is not silent."""
    monkeypatch.setattr(progress, "_heard_by", [progress.Listener()])
    with pytest.warns(UserWarning, match="^the cache is made anew$"):
        progress.note("warning: the cache is made anew")
