"""Starts of train.py, cold and warm: what is kept of them, and what is said of one that fails."""

import json
import sys

import pytest
from support import ROOT

sys.path[:0] = [str(ROOT / "benchmarks")]

import start_time  # noqa: E402


def test_medians_of_cold_and_warm_starts_are_kept(tmp_path, monkeypatch, capsys):
    seconds = {"cold": [30.0, 50.0, 40.0], "warm": [12.0, 10.0, 11.0]}
    caches = []

    def start(config, overrides, cache):
        caches.append(cache)
        empty = not list(cache.iterdir())
        (cache / "program").write_text("")
        assert (config, overrides) == ("c.yaml", ["seed=1"])
        return {"seconds": seconds["cold" if empty else "warm"].pop(0), "compile_seconds": 20.0 if empty else None}

    monkeypatch.setattr(start_time, "start", start)
    monkeypatch.setattr(sys, "argv", ["start_time.py", "--config", "c.yaml", "seed=1", "--out", str(tmp_path / "r" / "a.json")])
    assert start_time.main() == 0
    found = json.loads((tmp_path / "r" / "a.json").read_text())
    assert (found["cold"]["median_seconds"], found["warm"]["median_seconds"]) == (40.0, 11.0)
    assert found["cold"]["median_compile_seconds"] == 20.0 and found["warm"]["median_compile_seconds"] is None
    assert len(found["warm"]["starts"]) == 3 and len(set(caches)) == 3 and not any(cache.exists() for cache in caches)
    assert found["command"].startswith("python benchmarks/start_time.py --config c.yaml") and found["device"] and found["versions"]["jax"]
    assert "c.yaml, cold: 40.0 s to the end of the first step, 20.0 s of it compiling" in capsys.readouterr().out


def test_a_start_that_fails_says_why(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["start_time.py", "--config", "nowhere.yaml", "--out", "never.json"])
    assert start_time.main() == 2
    assert "ended with 2: error: config file nowhere.yaml does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(("line", "seconds"), [("222.70 queries/s, 10289 tokens/s, 0:51 in steps, 5.9 s compiling", "5.9"), ("no", None)])
def test_the_compilers_share_is_read_from_what_train_says(line, seconds):
    found = start_time.COMPILING.search(line)
    assert (found and found[1]) == seconds
