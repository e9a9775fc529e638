"""The first minutes on a card, without the card: what is missing is named, each step's result stays, a second call does the rest."""

import json
import sys

import pytest
from support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_acceptance

WRITES = "import json, pathlib, sys; pathlib.Path(sys.argv[sys.argv.index('--out') + 1]).write_text(json.dumps({'checks': []}))"


@pytest.fixture
def called(monkeypatch, tmp_path):
    """call(steps) -> (exit code, the file's steps); the steps are Python programs."""
    monkeypatch.setattr("kept.device", lambda: ("gpu", "NVIDIA Made-up"))
    out = tmp_path / "results" / "acceptance.json"

    def call(**steps):
        for name, code in steps.items():
            (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.setattr(gpu_acceptance, "steps", lambda tiny: {n: ([str(tmp_path / f"{n}.py")], 60) for n in steps})
        monkeypatch.setattr(sys, "argv", ["gpu_acceptance.py", "--out", str(out)])
        code = gpu_acceptance.main()
        return code, json.loads(out.read_text())

    return call


def test_a_step_that_fails_takes_none_with_it_and_is_done_again(called, capsys):
    code, first = called(first=WRITES, second="raise SystemExit('the card fell off')", third=WRITES)
    assert code == 1 and first["device"] == "NVIDIA Made-up" and first["versions"]["jax"]
    assert [s["exit"] for s in first["steps"].values()] == [0, 1, 0] and first["steps"]["second"]["said"] == "the card fell off"
    assert "second: NOT RIGHT" in capsys.readouterr().out
    code, again = called(first="raise SystemExit(3)", second=WRITES, third="raise SystemExit(3)")
    assert code == 0 and again["steps"]["first"] == first["steps"]["first"] and again["steps"]["second"]["exit"] == 0
    assert "first: done" in (out := capsys.readouterr().out) and "(from before)" in out


def test_a_step_that_is_stopped_says_so(called, monkeypatch, capsys):
    """Also where all its checks were right until then."""
    run = gpu_acceptance.run
    monkeypatch.setattr(gpu_acceptance, "run", lambda arguments, seconds, why: run(arguments, 2, why))
    code, _ = called(first=WRITES + "; import time; time.sleep(60)")
    assert code == 1 and "first: NOT RIGHT" in (out := capsys.readouterr().out) and "0 of 0 checks; stopped after 2 s\n" in out


def test_results_of_another_device_are_not_taken_over_and_not_lost(called, monkeypatch, tmp_path):
    _, before = called(first=WRITES)
    monkeypatch.setattr("kept.device", lambda: ("gpu", "NVIDIA Other"))
    code, report = called(first="raise SystemExit('not here')")
    assert code == 1 and report["device"] == "NVIDIA Other" and report["steps"]["first"]["exit"] == 1
    assert json.loads((tmp_path / "results" / "acceptance.1.json").read_text()) == before


def test_what_is_missing_is_named_with_its_wheels(monkeypatch, capsys):
    monkeypatch.setattr(gpu_acceptance, "missing", lambda: ["pydantic"])
    monkeypatch.setattr(sys, "argv", ["gpu_acceptance.py"])
    assert gpu_acceptance.main() == 2
    said = capsys.readouterr().err
    assert "lacks pydantic." in said and "pip download" in said and "pydantic-core annotated-types" in said


def test_every_step_is_a_command_that_exists():
    for arguments, seconds in gpu_acceptance.steps(tiny=False).values():
        assert (ROOT / arguments[0]).is_file() and seconds <= 240
    assert next(iter(gpu_acceptance.steps(tiny=True))) == "doctor" and not gpu_acceptance.missing()
