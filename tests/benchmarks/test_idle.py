# ruff: noqa: E402 (benchmarks/ has to be on the path first)
"""The share of time in which no step was under way, on times of our choosing and on a real run."""

import sys

import pytest
from support import ROOT

sys.path[:0] = [str(ROOT / "benchmarks")]

import idle

from moejax.training import loop


def test_gaps_between_steps():
    watch = idle.Watch()
    watch.close()
    watch.sent = [0.0, 0.5, 1.0, 3.5, 3.6, 9.0]
    watch.done = [
        1.0,
        2.0,
        3.0,
        4.5,
        5.5,
        10.0,
    ]  # the fourth was sent half a second late; before the sixth there was an evaluation
    watch.other = {5}
    assert idle.gaps(watch) == {
        "steps": 4,
        "seconds": pytest.approx(3.5),
        "idle_seconds": pytest.approx(0.5),
        "idle_share": pytest.approx(1 / 7),
    }


def test_a_run_is_watched_and_left_as_it_was(capsys, monkeypatch):
    config = str(ROOT / "configs" / "bench_mixtral_tiny.yaml")
    tiny = ["data.batch_rows=1", "data.row_tokens=16", "data.max_length=16", "model.overrides={num_layers: 1}"]
    monkeypatch.setattr(sys, "argv", ["idle.py", "--config", config, "--steps", "5", *tiny])
    assert idle.main() == 0
    assert "the device waited" in capsys.readouterr().out.splitlines()[-1] and loop.Trainer.__name__ == "Trainer"
