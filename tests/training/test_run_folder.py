"""A run's folder: which configs may continue it."""

import pytest
import yaml

from moejax.config import DeviceConfig, dump
from moejax.errors import UserError
from moejax.training import run_folder


def test_what_may_differ_when_a_run_is_continued(make_experiment):
    experiment = make_experiment("older")
    folder = run_folder.prepare(experiment, resume=False)
    run_folder.write_config(folder, experiment)
    config = folder / "config.yaml"
    older = yaml.safe_load(config.read_text())
    del older["device"]["compilation_cache"], older["profile"]  # a run of a version that did not know these keys
    config.write_text(yaml.safe_dump(older))
    assert run_folder.prepare(experiment, resume=True) == folder
    elsewhere = experiment.model_copy(update={"device": DeviceConfig(memory_fraction=0.5)})
    assert run_folder.prepare(elsewhere, resume=True) == folder
    with pytest.raises(UserError, match="seed: 0 -> 1"):
        run_folder.prepare(experiment.model_copy(update={"seed": 1}), resume=True)
    older["sedd"] = 1
    config.write_text(yaml.safe_dump(older))
    with pytest.raises(UserError, match="sedd"):
        run_folder.prepare(experiment, resume=True)
    assert "sedd" not in dump(experiment)
