"""A small study, and children that only pretend to measure: they say what they were asked, and do what a test told them to."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from support import ROOT, TINY

from moejax.characterize import study
from moejax.characterize.sweep import Sweep
from moejax.report.results import Environment, MemoryLimit

FAKE = Path(__file__).parent / "fake_trial.py"
SIZES = [
    "sweep.routings=[sparse]", "sweep.batches=[1, largest]", "sweep.packed=[largest]", "sweep.queries=8", "sweep.breakdown_tokens=32",
    "sweep.lengths=[32]", "sweep.tune_steps=2", "sweep.load_queries=8", "sweep.timed=2", "sweep.traced=1",
]  # fmt: skip
ENVIRONMENT = Environment("a CPU", "cpu", 10**9, 1e10, 1e9, "measured", {"jax": "0"}, "a CPU", "abc", "0123")


def write_config(folder, **sections):
    """A tiny Mixtral by QLoRA on the bundled problems; returns the file."""
    content = {
        "name": "tiny",
        "model": {"preset": "mixtral-tiny", "overrides": TINY},
        "quantization": {"format": "nf4"},
        "adapter": {"rank": 2, "alpha": 4.0},
        "tokenizer": str(ROOT / "assets/tiny-mixtral/tokenizer.json"),
        "data": {"source": str(ROOT / "assets/problems/test.json"), "row_tokens": 64, "max_length": 64},
        "training": {"epochs": 1, "learning_rate": 1e-3, "compute_dtype": "float32"},
    }
    for name, changes in sections.items():
        content[name] = content.get(name, {}) | changes
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(content))
    return str(file)


@pytest.fixture
def config_file(tmp_path):
    return write_config(tmp_path)


@pytest.fixture
def open_sweep(tmp_path, config_file):
    """open_sweep(behaviour={trial: what}) -> Sweep in tmp_path/out whose children pretend. Behaviours: fake_trial.py."""

    def make(behaviour=None, environment=ENVIRONMENT, overrides=(), out=tmp_path / "out"):
        out.parent.mkdir(exist_ok=True)
        (tmp_path / "behaviour.json").write_text(json.dumps(behaviour or {}))
        wanted = study.resolve(None, [config_file], [*SIZES, *overrides], 10**7, False)
        start = (sys.executable, str(FAKE), str(tmp_path))
        return Sweep.open(wanted, out, None, "a command", environment, MemoryLimit(10**7, True), start=start)

    return make


@pytest.fixture
def ran(tmp_path):
    """ran() -> names of the trials whose processes began, in order."""

    def read():
        file = tmp_path / "ran.txt"
        return file.read_text().split() if file.exists() else []

    return read


@pytest.fixture
def fake_environment():
    return ENVIRONMENT
