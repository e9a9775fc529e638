"""The GPU benchmarks run, small, on a CPU."""

import importlib
import json
import sys

import pytest
from support import ROOT


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(script, arguments) -> its report. In this process, which has jax already."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def go(script, *arguments):
        out = tmp_path / "result.json"
        monkeypatch.setattr(sys, "argv", [f"benchmarks/{script}.py", *arguments, "--out", str(out)])
        assert not importlib.import_module(script).main()
        return json.loads(out.read_text())

    return go


def check_step(report, cases):
    assert report["device"] and report["versions"]["jax"] and report["command"].startswith("python benchmarks/gpu_step.py --tiny")
    assert [(c["routing"], c["experts_per_token"]) for c in report["cases"]] == cases
    for case in report["cases"]:
        assert case["tokens_per_second"] > 0 and case["compiler_peak_bytes"] > 0 and case["loss"] > 0


@pytest.mark.parametrize("model", ["mixtral", "blackmamba"])
def test_gpu_step_of_two_routings(model, run):
    arguments = ["--tiny", "--model", model, "--steps", "1", "--cases", "2x32:2", "--routing", "uniform,skewed"]
    report = run("gpu_step", *arguments)
    check_step(report, [("uniform", 2), ("skewed", 2)])
    uniform, skewed = report["cases"]
    assert skewed["largest_expert_share"] > uniform["largest_expert_share"]


@pytest.mark.long
@pytest.mark.parametrize("model", ["mixtral", "blackmamba"])
def test_gpu_step_tiny(model, run):
    report = run("gpu_step", "--tiny", "--model", model, "--steps", "1", "--routing", "uniform,skewed", "--trace")
    check_step(report, [("uniform", 2), ("uniform", 8), ("skewed", 2), ("skewed", 8)])
    for trace in (case["trace"] for case in report["cases"]):
        assert trace["attributed"] > 0.9 and trace["stages"]["moe/w1"] > 0 and sum(trace["phases"].values()) >= trace["busy_seconds"]
    cases = report["cases"]
    assert cases[2]["largest_expert_share"] > cases[0]["largest_expert_share"]


def test_scan_choice_tiny(run):
    report = run("scan_choice", "--tiny")
    assert {c["form"] for c in report["cases"]} == {"chunked", "chunked_associative", "associative"}
    for case in report["cases"]:
        assert case["seconds"]["median"] > 0 and case["floor_bytes"] > 0
        assert case["largest_difference"] < 1e-4


def test_grouped_choice_tiny(run):
    report = run("grouped_choice", "--tiny")
    assert [c["storage"] for c in report["cases"]] == ["array", "nf4-double"] and report["ragged_flops_of_useful"] > 2
    for case in report["cases"]:
        assert case["entry"]["backend"] in ("loop", "capacity")  # ragged is dense on a CPU
        assert all(d < 1e-5 for d in case["difference_from_fp32"].values())


def test_dequant_forms_small(run):
    forms = run("dequant_forms", "--shape", "64x128", "--repeat", "1")["forms"]
    assert set(forms) == {f"{layout}, {form}" for layout in ("halves", "pairs") for form in ("take", "tree")}
    assert all(form["seconds"] > 0 for form in forms.values())
