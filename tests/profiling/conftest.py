"""One profiled run for all tests that read one."""

import contextlib
import io
from pathlib import Path
from typing import NamedTuple

import pytest
from support import tiny_experiments

from moejax.training import loop


class Profiled(NamedTuple):
    folder: Path
    output: str


@pytest.fixture(scope="session")
def session_experiment(tmp_path_factory):
    """make_experiment for the whole session: names must differ."""
    return tiny_experiments(tmp_path_factory.mktemp("profiled"))


@pytest.fixture(scope="session")
def profiled(session_experiment):
    """Eight steps, the third and the fourth traced: the folder and what was printed."""
    training = {"steps": 8, "gradient_accumulation": 1, "schedule": "constant"}
    experiment = session_experiment("traced", training=training, profile={"start_step": 3, "steps": 2})
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert loop.run(experiment, resume=False) == 0
    return Profiled(Path(experiment.runs_dir) / experiment.name, output.getvalue())
