# ruff: noqa: E402 (benchmarks/ has to be on the path first)
"""Two frameworks in turn: processes that answer steps, memory that runs out on one side, and the table. The sides are played here."""

import json
import sys
from contextlib import contextmanager

import pytest
from support import ROOT

sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "pytorch")]

import contract
import gpu_frameworks
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


NAME = gpu_frameworks.BF16_SMALL


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
    values = {"tiny": False, "steps": 4, "row_tokens": 128, "rows": 4, "most_rows": 64, "pythons": {}, "arguments": []}
    return gpu_frameworks.Settings(**values | changes)


def beginner(rooms):
    @contextmanager
    def begin(name, case, rows, settings, fraction):
        yield Fake(name, rows, rooms[name])

    return begin


def test_out_of_memory_is_recorded_and_the_others_go_on():
    begin = beginner({"moejax": 20, "today": 0})
    report = {"cases": {NAME: gpu_frameworks.measure(NAME, settings(), gpus.GPUS["H100"], begin)}}
    same, best = report["cases"][NAME]["same batch"], report["cases"][NAME]["best batch"]
    assert same["today"] == {"error": "out of memory: no memory", "out_of_memory": True}
    assert same["moejax"]["rows"] == 4 and len(same["moejax"]["step_seconds"]) == 4 and best["today"]["out_of_memory"]
    assert "| today | cannot run: out of memory: no memory |" in gpu_frameworks.table(report)
    report["cases"][NAME] = gpu_frameworks.measure(NAME, settings(), gpus.GPUS["H100"], beginner({"moejax": 20, "today": 64}))
    best = report["cases"][NAME]["best batch"]
    # Doubled until memory is full, then the middle: 4, 8, 16, 32 (full), 24 (full).
    assert [t["rows"] for t in best["moejax"]["tried"]] == [4, 8, 16, 32, 24]
    assert best["moejax"]["rows"] == best["moejax"]["largest_rows_that_ran"] == 16
    cell = best["today"]
    assert cell["rows"] == 64
    assert len(cell["step_seconds"]) == 4 and cell["matrix_rate_flops"] == 6e14
    assert cell["share_of_matrix_rate"] == pytest.approx(cell["model_flops"] / cell["median"] / 6e14)
    assert cell["usd_per_1000_queries"] == pytest.approx(3.85 / 3.6 / cell["queries_per_second"])
    text = gpu_frameworks.table(report)
    assert f"| {NAME} | best batch | today | 64 x 128 | 0.740 (0.740 to 0.740) | 86.49 |" in text
    assert {line.count("|") for line in text.splitlines()} == {len(gpu_frameworks.HEADER) + 1}


def cell(rows=8, median=0.2, tokens=1000.0, **more):
    about = {"compiler_peak_bytes": 29.9e9, "copy_bytes_per_second": 4.3e12}
    queries = {"queries_per_second": tokens / 100, "tokens_per_second": tokens, "device_peak_bytes": 30e9}
    return {"rows": rows, "median": median, "about": about, "share_of_matrix_rate": 0.41} | queries | more


def test_every_bar_is_told_with_what_was_reached():
    """The arithmetic of each bar, on a report as the file holds it."""
    fallen = {"error": "out of memory: no memory", "out_of_memory": True}
    cases = {
        gpu_frameworks.NF4: {
            "best batch": {"moejax": cell(tokens=6000.0), "study": cell(tokens=490.0)},
            "one query": {"moejax": cell(rows=1, median=0.213)},
            "expert_weights": 3 * 32 * 8 * 4096 * 14336,
        },
        gpu_frameworks.BF16: {"best batch": {"moejax": cell(), "today": fallen}},
        gpu_frameworks.BF16_SMALL: {"best batch": {"moejax": cell(), "today": cell(tokens=900.0)}},
        gpu_frameworks.MAMBA: {"best batch": {"moejax": cell(device_peak_bytes=28e9), "plain": cell(tokens=400.0)}},
    }
    cases = json.loads(json.dumps(cases))
    times, share, floor, bf16, small, mamba, peak = gpu_frameworks.bars(cases)
    assert times["reached"] == pytest.approx(6000 / 490) and times["met"] and times["needed"] == "at least 10"
    assert (share["reached"], share["met"]) == (0.41, True)
    # 45.1 G weights: 33 / 64 of a byte read, two bytes written and two read, three times, at 4,300 GB/s: 142 ms.
    assert floor["reached"] == pytest.approx(0.213 / 0.142, rel=2e-3) and floor["met"]
    assert bf16["reached"] is None and bf16["why_not"] == f"{gpu_frameworks.BF16}, best batch, today: out of memory: no memory"
    assert small["reached"] == pytest.approx(1 / 0.9) and small["met"] is False
    assert mamba["reached"] == pytest.approx(2.5) and mamba["met"]
    assert peak["reached"] == pytest.approx(29.9 / 28 - 1) and peak["met"] is False  # the worst of all
    text = gpu_frameworks.bar_table(gpu_frameworks.bars(cases))
    assert "| at least 10 | 12.2 | met |" in text and "| at least 1.2 | 1.11 | MISSED |" in text
    assert "not measured: " in text and {line.count("|") for line in text.splitlines()} == {5}
    assert all(b["met"] is None and "not run" in b["why_not"] for b in gpu_frameworks.bars({})[:1])
    assert [b["why_not"] for b in gpu_frameworks.bars({})][-1] == "no device told its peak"


def test_one_query_is_run_where_a_bar_asks_for_it():
    begin = beginner({"moejax": 20, "study": 64})
    found = gpu_frameworks.measure(gpu_frameworks.NF4, settings(), gpus.GPUS["H100"], begin)
    assert found["one query"]["moejax"]["rows"] == 1 and found["one query"]["moejax"]["median"] == pytest.approx(0.11)
    assert found["expert_weights"] == pytest.approx(45.1e9, rel=1e-3) and found["one query"].keys() == {"moejax"}
    assert "| one query | moejax | 1 x 128 |" in gpu_frameworks.table({"cases": {gpu_frameworks.NF4: found}})


def test_cases_are_experiments_both_sides_can_express():
    for case in gpu_frameworks.CASES.values():
        for tiny in (False, True):
            experiment = settings(tiny=tiny).experiment(case, 2)
            sizes = architecture(experiment, None)
            contract.check({"experiment": experiment.model_dump(mode="json"), "hub_config": sizes.to_hub_config()}, case.stack)
            assert not tiny or (sizes.intermediate_size, sizes.num_layers) == (128, 2)
            assert experiment.training.compute_dtype == ("float32" if tiny else "bfloat16")


def test_without_a_gpu_it_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu_frameworks.py", "--reference4", sys.executable, "--reference5", sys.executable])
    monkeypatch.setattr(gpu_frameworks.kept.subprocess, "run", lambda *a, **k: type("Done", (), {"stdout": "cpu|cpu\n"}))
    assert gpu_frameworks.main() == 2
    assert "jax finds no GPU here" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["gpu_frameworks.py", "--reference5", str(tmp_path / "none")])
    monkeypatch.setattr(gpu_frameworks.torch_run, "HERE", tmp_path)
    assert gpu_frameworks.main() == 2
    assert "`make reference4` builds" in capsys.readouterr().err
