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


@pytest.mark.parametrize(("model", "more"), [pytest.param("mixtral_8x7b", ["--trace"], marks=pytest.mark.long), ("blackmamba_2.8b", [])])
def test_step_of_a_tiny_model(model, more, run):
    tiny = f"model.preset={model.partition('_')[0]}-tiny"
    config = str(ROOT / "configs" / f"{model}_cs_sparse.yaml")
    report = run("step", "--config", config, "--cases", "2x32:2", "--steps", "1", *more, tiny)
    assert report["device"] and report["versions"]["jax"] and report["command"].startswith("python benchmarks/step.py --config")
    (case,) = report["cases"]
    assert case["experts_per_token"] == 2 and min(case[n] for n in ("tokens_per_second", "compiler_peak_bytes", "loss", "median")) > 0
    if trace := case.get("trace"):
        assert trace["attributed"] > 0.9 and trace["stages"]["moe/w1"] > 0 and sum(trace["phases"].values()) >= trace["busy_seconds"]


def test_scan_choice_tiny(run):
    report = run("scan_choice", "--tiny")
    assert {c["form"] for c in report["cases"]} == {"chunked", "chunked_associative", "associative"}
    for case in report["cases"]:
        assert case["seconds"]["median"] > 0 and case["floor_bytes"] > 0
        assert case["largest_difference"] < 1e-4


@pytest.mark.long
def test_grouped_choice_tiny(run):
    report = run("grouped_choice", "--tiny")
    assert [c["storage"] for c in report["cases"]] == ["array", "nf4-double"]
    for case in report["cases"]:
        assert case["entry"]["backend"] in ("loop", "capacity")
        assert all(d < 1e-5 for d in case["difference_from_fp32"].values())
