"""A small study, and children that only pretend to measure: they say what they were asked, and do what a test told them to."""

import json
import sys

import pytest
from small_study import ENVIRONMENT, FAKE, SIZES, write_config

from moejax.study.characterize import study
from moejax.study.characterize.sweep import Sweep
from moejax.study.report.results import MemoryLimit


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
