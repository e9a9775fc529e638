# ruff: noqa: E402 (benchmarks/ has to be on the path first)
"""Two frameworks in turn: processes that answer steps, memory that runs out on one side, and the table. The sides are played here."""

import sys
from contextlib import contextmanager

import pytest
from support import ROOT

sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "pytorch")]

import contract
import step_times
import turns

from moejax import gpus
from moejax.hub.model import architecture

PLAYED = """
import json, sys
print("a library's word")
print(json.dumps({"ready": True}), flush=True)
for number, line in enumerate(sys.stdin):
    if number == LAST:
        print("out of memory: tried to allocate 9 GB", file=sys.stderr)
        sys.exit(3)
    print(json.dumps({"step_seconds": 0.5 + number, "loss": 1.0, "queries": 4, "real_tokens": 40, "host_peak_bytes": 7}), flush=True)
"""


def played(last=-1):
    return turns.Side([sys.executable, "-c", PLAYED.replace("LAST", str(last))])


def test_sides_take_turns_and_warm_up_does_not_count():
    with played() as a, played() as b:
        taken = turns.alternate({"a": a, "b": b}, 3)
        assert not a.ended
    assert [s["step_seconds"] for s in taken["a"]] == [2.5, 3.5, 4.5] == [s["step_seconds"] for s in taken["b"]]
    summary = turns.summary(taken["a"])
    assert (summary["median"], summary["fastest"], summary["slowest"], summary["host_peak_bytes"]) == (3.5, 2.5, 4.5, 7)
    assert summary["queries_per_second"] == pytest.approx(4 / 3.5)


def test_a_side_that_ends_says_why():
    with played(last=1) as side:
        side.step()
        with pytest.raises(turns.Stopped, match="out of memory: tried to allocate 9 GB") as error:
            side.step()
        assert error.value.out_of_memory and side.ended
    with pytest.raises(turns.Stopped, match="no such model") as error:
        turns.Side([sys.executable, "-c", "import sys; print('error: no such model', file=sys.stderr); sys.exit(2)"])
    assert not error.value.out_of_memory


NAME = "Mixtral, 8 of 32 layers, bf16, shared A, k = 2"


class Fake:
    """A side with room for `room` rows."""

    def __init__(self, name, rows, room):
        self.rows, self.room, self.ended = rows, room, False
        self.about = {"matrix_rate_flops": {"moejax": 6e14, "today": 5e14}.get(name), "compile_seconds": 30.0}

    def step(self):
        if self.rows > self.room:
            self.ended = True
            raise turns.Stopped("no memory", True)
        # Twice the rows take less than twice the time.
        return {
            "step_seconds": 0.1 + 0.01 * self.rows,
            "queries": self.rows,
            "real_tokens": 128 * self.rows,
            "device_peak_bytes": 5e9,
        }


def settings(**changes):
    values = {"cpu": False, "tiny": False, "steps": 4, "row_tokens": 128, "rows": 4, "most_rows": 64, "pythons": {}, "arguments": []}
    return step_times.Settings(**values | changes)


def beginner(rooms):
    @contextmanager
    def begin(name, case, rows, settings, fraction):
        yield Fake(name, rows, rooms[name])

    return begin


def test_out_of_memory_is_recorded_and_the_others_go_on():
    begin = beginner({"moejax": 20, "today": 0})
    report = {"cases": {NAME: step_times.measure(NAME, settings(), gpus.GPUS["H100"], begin)}}
    same, best = report["cases"][NAME]["same batch"], report["cases"][NAME]["best batch"]
    assert same["today"] == {"error": "out of memory: no memory", "out_of_memory": True}
    assert same["moejax"]["rows"] == 4 and len(same["moejax"]["step_seconds"]) == 4 and best["today"]["out_of_memory"]
    assert "| today | cannot run: out of memory: no memory |" in step_times.table(report)
    report["cases"][NAME] = step_times.measure(NAME, settings(), gpus.GPUS["H100"], beginner({"moejax": 20, "today": 64}))
    best = report["cases"][NAME]["best batch"]
    # Doubled until memory is full, then the middle: 4, 8, 16, 32 (full), 24 (full).
    assert [t["rows"] for t in best["moejax"]["tried"]] == [4, 8, 16, 32, 24]
    assert best["moejax"]["rows"] == 16
    cell = best["today"]
    assert cell["rows"] == 64
    assert len(cell["step_seconds"]) == 4 and cell["matrix_rate_flops"] == 6e14
    assert cell["share_of_matrix_rate"] == pytest.approx(cell["model_flops"] / cell["median"] / 6e14)
    assert cell["usd_per_1000_queries"] == pytest.approx(3.85 / 3.6 / cell["queries_per_second"])
    text = step_times.table(report)
    assert f"| {NAME} | best batch | today | 64 x 128 | 0.740 (0.740 to 0.740) | 86.49 |" in text
    assert {line.count("|") for line in text.splitlines()} == {len(step_times.HEADER) + 1}


def test_of_a_cpu_s_case_the_own_batch_is_run_once(capsys, monkeypatch, tmp_path):
    """Next to PyTorch, from the config's own weights; the ratio is of the medians."""
    found = step_times.measure("olmoe", settings(cpu=True), None, beginner({"moejax": 20, "study": 64}))
    assert found["row_tokens"] == 512 and "best batch" not in found and found["times_as_fast"] == {"same batch": 1.0}
    assert [cell["rows"] for cell in found["same batch"].values()] == [4, 4]
    assert "| olmoe | same batch | study | 4 x 512 |" in step_times.table({"cases": {"olmoe": found}})
    python = ["--reference4", sys.executable, "--reference5", sys.executable]
    monkeypatch.setattr(sys, "argv", ["step_times.py", "--cpu", "--cases", NAME, *python])
    assert step_times.main() == 2 and "with --cpu expected mixtral; blackmamba;" in capsys.readouterr().err
    fallen = {"row_tokens": 16, "same batch": {"moejax": {"error": "none"}}, "times_as_fast": {}}
    monkeypatch.setattr(step_times, "measure", lambda *_: fallen)
    monkeypatch.setattr(sys, "argv", ["step_times.py", "--cpu", "--cases", "olmoe", "--out", str(tmp_path / "a.json"), *python])
    assert step_times.main() == 1 and "| olmoe | same batch | moejax | cannot run: none |" in capsys.readouterr().out


def test_cases_are_experiments_both_sides_can_express():
    for case in [*step_times.CASES.values(), *step_times.CPU_CASES.values()]:
        for tiny in (False, True):
            experiment = settings(tiny=tiny).experiment(case, 2)
            sizes = architecture(experiment, None)
            contract.check({"experiment": experiment.model_dump(mode="json"), "hub_config": sizes.to_hub_config()}, case.stack)
            assert not tiny or not case.random or (sizes.intermediate_size, sizes.num_layers) == (128, 2)
            assert experiment.training.compute_dtype == ("float32" if tiny or not case.random else "bfloat16")


def test_without_a_gpu_it_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["step_times.py", "--reference4", sys.executable, "--reference5", sys.executable])
    monkeypatch.setattr(step_times.kept.subprocess, "run", lambda *a, **k: type("Done", (), {"stdout": "cpu|cpu\n"}))
    assert step_times.main() == 2
    assert "jax finds no GPU here" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["step_times.py", "--reference5", str(tmp_path / "none")])
    monkeypatch.setattr(step_times.torch_run, "HERE", tmp_path)
    assert step_times.main() == 2
    assert "`make reference4` builds" in capsys.readouterr().err
