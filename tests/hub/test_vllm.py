"""vLLM itself reads an export, and serves it: in .venv-vllm, where tests/oracles/README.md says how to make it."""

import os
import subprocess
import sys

import pytest
from support import ROOT

VLLM = ROOT / ".venv-vllm/bin/python"
pytestmark = [pytest.mark.long, pytest.mark.skipif(not VLLM.exists(), reason="no .venv-vllm: tests/oracles/README.md")]


def done(python, script, *arguments):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}" if python == sys.executable else ""}
    given = [python, ROOT / "tests/oracles" / script, *arguments]
    ran = subprocess.run(given, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    print(ran.stdout)


@pytest.mark.parametrize(
    ("what", "preset"),
    [("loaded", "mixtral-tiny"), ("loaded", "qwen3-moe-tiny"), ("loaded", "olmoe-tiny"), ("served", "mixtral-tiny"),
     ("served", "qwen3-moe-tiny"), ("served", "olmoe-tiny"), ("served", "flex-olmo-tiny")],
)  # fmt: skip
def test_an_adapter(what, preset, tmp_path):
    """Every pair as its loader packs it; and, of attention and router, the logits of its engine."""
    done(sys.executable, "write_adapter.py", tmp_path, preset, *(["no-experts"] if what == "served" else []))
    done(VLLM, "check_served.py", what, tmp_path)


@pytest.mark.parametrize("base", ["tiny-mixtral", "tiny-qwen3-moe"])
def test_a_merged_model(base, tmp_path):
    done(sys.executable, "write_export.py", tmp_path, base)
    done(VLLM, "check_served.py", "merged", tmp_path)
