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


def test_gpu_scan_tiny(tmp_path):
    out = tmp_path / "result.json"
    command = [sys.executable, "benchmarks/gpu_scan.py", "--tiny", "--out", str(out)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert {c["form"] for c in report["cases"]} == {"chunked", "chunked_associative", "associative"}
    for case in report["cases"]:
        assert case["seconds"]["median"] > 0 and case["floor_bytes"] > 0
        assert case["largest_difference"] < 1e-4
