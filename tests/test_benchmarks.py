"""The GPU benchmark runs, small, on a CPU."""

import json
import os
import subprocess
import sys

import pytest
from support import ROOT


@pytest.mark.parametrize("model", ["mixtral", "blackmamba"])
def test_gpu_step_tiny(model, tmp_path):
    out = tmp_path / "result.json"
    command = [
        sys.executable,
        "benchmarks/gpu_step.py",
        "--tiny",
        "--model",
        model,
        "--steps",
        "1",
        "--routing",
        "uniform,skewed",
        "--out",
        str(out),
    ]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert (
        report["device"] and report["versions"]["jax"] and report["command"].startswith("python benchmarks/gpu_step.py --tiny")
    )
    cases = report["cases"]
    assert [(c["routing"], c["experts_per_token"]) for c in cases] == [
        ("uniform", 2),
        ("uniform", 8),
        ("skewed", 2),
        ("skewed", 8),
    ]
    for case in cases:
        assert case["tokens_per_second"] > 0 and case["compiler_peak_bytes"] > 0 and case["loss"] > 0
    assert cases[2]["largest_expert_share"] > cases[0]["largest_expert_share"]


def test_scan_choice_tiny(tmp_path):
    out = tmp_path / "result.json"
    command = [sys.executable, "benchmarks/scan_choice.py", "--tiny", "--out", str(out)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert {c["form"] for c in report["cases"]} == {"chunked", "chunked_associative", "associative"}
    for case in report["cases"]:
        assert case["seconds"]["median"] > 0 and case["floor_bytes"] > 0
        assert case["largest_difference"] < 1e-4


def run_tiny(tmp_path, script, *arguments):
    out = tmp_path / "result.json"
    command = [sys.executable, f"benchmarks/{script}.py", *arguments, "--out", str(out)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def test_grouped_choice_tiny(tmp_path):
    report = run_tiny(tmp_path, "grouped_choice", "--tiny")
    assert [c["storage"] for c in report["cases"]] == ["array", "nf4-double"] and report["ragged_flops_of_useful"] > 2
    for case in report["cases"]:
        assert case["entry"]["backend"] in ("loop", "capacity")  # ragged is dense on a CPU
        assert all(d < 1e-5 for d in case["difference_from_fp32"].values())


def test_dequant_forms_small(tmp_path):
    forms = run_tiny(tmp_path, "dequant_forms", "--shape", "64x128", "--repeat", "1")["forms"]
    assert set(forms) == {"pair", "take", "tree", "steps"} and forms["pair"]["large_fusions"] == 1


def test_gpu_attention_tiny(tmp_path):
    cases = run_tiny(tmp_path, "gpu_attention", "--tiny", "--repeat", "1")["cases"]
    assert {c["form"] for c in cases} == {"ours", "xla"} and all(c["difference"] < 2e-2 for c in cases)
