"""The first minutes on a card, without the card: what is missing is named, each step's result stays, a second call does the rest."""

import json
import sys

import pytest
from support import ROOT

from moejax import config

sys.path.insert(0, str(ROOT / "benchmarks"))
import bars
import gpu_acceptance
import kept

WRITES = "import json, pathlib, sys; pathlib.Path(sys.argv[sys.argv.index('--out') + 1]).write_text(json.dumps({'checks': []}))"


@pytest.fixture
def called(monkeypatch, tmp_path):
    """call(steps) -> (exit code, the file's steps); the steps are Python programs."""
    monkeypatch.setattr("kept.device", lambda: ("gpu", "NVIDIA Made-up"))
    out = tmp_path / "results" / "acceptance.json"

    def call(**steps):
        for name, code in steps.items():
            (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.setattr(gpu_acceptance, "steps", lambda tiny: {
            n: gpu_acceptance.Step([str(tmp_path / f"{n}.py")], 60, 1 + n.startswith("later")) for n in steps
        })  # fmt: skip
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
    for tiny in (False, True):
        for arguments, seconds, part in gpu_acceptance.steps(tiny).values():
            assert (ROOT / arguments[0]).is_file() and seconds <= 300 and part in (1, 2)
    parts = [step.part for step in gpu_acceptance.steps(False).values()]
    assert next(iter(gpu_acceptance.steps(tiny=True))) == "doctor" and not gpu_acceptance.missing() and parts == sorted(parts)


def test_the_second_part_has_its_own_minutes(called, monkeypatch, capsys):
    limits = []
    monkeypatch.setattr(gpu_acceptance, "run", lambda arguments, seconds, why: limits.append(seconds) or {"exit": 0, "seconds": 1})
    monkeypatch.setattr(gpu_acceptance, "LEAST_SECONDS", 0)
    called(first=WRITES, later=WRITES)
    assert limits == [60, 60]
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--more-minutes", "0"])
    assert gpu_acceptance.main() == 0 and "later" not in capsys.readouterr().out


CASE = {"median": 0.25, "useful_share": 0.4, "device_peak_bytes": 30e9}


def test_every_bar_is_of_a_program_that_loads_and_a_step_that_is_run():
    for program in bars.PROGRAMS.values():
        rows, length = map(int, program["shape"].split("x"))
        config.load(ROOT / "configs" / f"{program['config']}.yaml", [*kept.of_rows(rows, length), *program["overrides"]])
    for bar in bars.BARS:
        assert ("least" in bar) != ("most" in bar) and ("result" in bar or {bar["program"]} <= set(bars.PROGRAMS))
        assert bar.get("measured", {"step": "doctor"})["step"] in gpu_acceptance.steps(tiny=False)


def test_the_table_of_bars_has_what_was_reached():
    """A card has the last word; what nobody compiled or ran is unknown."""
    compiled = {"mixtral 1x128": {"derived_ms": 190.0}, "mixtral 8x512": {"useful_share": 0.3}}
    found = {line.what: line for line in bars.lines(compiled, {})}
    assert found["mixtral 1x128 (H100): ms, derived"].met == "met" and found["mixtral 8x512 (H100): useful share"].met == "MISSED"
    assert found["mixtral 8x512 (H100): kernels"].met == "unknown"
    report = {"steps": {name: {"report": {"cases": [CASE]}} for name in ("mixtral 1x128", "mixtral 8x512")}}
    measured = {line.what: line for line in bars.lines(compiled, report)}
    assert measured["mixtral 1x128 (H100): ms, derived"][2:] == (190.0, 250.0, "MISSED")
    assert measured["mixtral 8x512 (H100): useful share"].met == "met"
    assert "| at most 200 | 190 | 250 | MISSED |" in bars.table(list(measured.values()))
    assert bars.measured_of({"steps": {"x": {"report": {"cases": [{"error": "out of memory"}]}}}}, "x", "ms") is None


def test_receipts_are_of_timed_steps_once_each():
    """Not of a traced step, and not twice of one program."""
    one = {"id": "a", "engagement": {"experts": "loop"}}
    other = one | {"engagement": {"experts": "capacity"}}
    report = {"steps": {
        "doctor": {"report": {}}, "a": {"report": {"cases": [{"receipt": one}, {"error": "x"}]}},
        "b": {"report": {"cases": [{"receipt": other}]}},
        "again": {"report": {"cases": [{"receipt": one}]}}, "traced": {"report": {"cases": [{"receipt": one, "trace": {}}]}},
        "torch": {"report": {"cases": {"Mixtral": {}}}}, "stopped": {"exit": -1},
    }}  # fmt: skip
    assert [receipt["id"] for receipt in gpu_acceptance.receipts_of(report)] == ["a-1", "a-2"]
