"""On which devices a run's model is asked, and what is said where that cannot be. What several processes say: evaluation/."""

import argparse

import pytest
from support import ROOT, finished_run

from moejax import cli
from moejax.commands.arguments import on_mesh
from moejax.config_mesh import MeshConfig
from moejax.errors import UserError
from moejax.models.config import PRESETS
from moejax.runs.devices import devices_of, joined, mesh_of

TINY = PRESETS["mixtral-tiny"]  # 8 experts


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The config of a run on four devices, in its folder."""
    folder = tmp_path_factory.mktemp("runs") / "four"
    data = {"source": str(ROOT / "assets/problems/train.json"), "batch_rows": 4}
    finished_run(folder, mesh={"devices": 4, "weights": "experts"}, data=data, adapter=None, quantization={"format": "none"})
    return folder


def test_as_it_was_trained_on_all_devices_or_as_asked(trained, tmp_path):
    assert mesh_of(trained) == MeshConfig(weights="experts")
    assert mesh_of(trained, ["mesh.devices=2", "mesh.weights=spread"]) == MeshConfig(devices=2, weights="spread")
    assert mesh_of(trained, ["mesh=null"]) is None and mesh_of(tmp_path) is None
    assert mesh_of(tmp_path, ["mesh.devices=3"]) == MeshConfig(devices=3)
    with pytest.raises(UserError, match=r"training.steps=3: expected mesh.key=value"):
        mesh_of(trained, ["training.steps=3"])
    with pytest.raises(UserError, match=r"mesh.weights = 'split': expected 'whole', 'spread' or 'experts'"):
        mesh_of(trained, ["mesh.weights=split"])


def test_one_device_is_no_mesh():
    assert devices_of(None, TINY) is None and devices_of(MeshConfig(devices=1), TINY) is None
    assert devices_of(MeshConfig(weights="experts"), TINY).count == 4


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"devices": 9}, "mesh.devices = 9: expected at most 4"),
        ({"devices": 3, "weights": "experts"}, "expected mesh.devices=2 or 4"),
        ({"weights": "spread"}, "of a run's frozen weights: expected experts or whole"),
    ],
)
def test_what_does_not_lie_so(asked, said):
    with pytest.raises(UserError, match=said):
        devices_of(MeshConfig(**asked), TINY)


def test_processes_that_do_not_know_of_each_other(tmp_path, monkeypatch):
    """A scheduler's, and a run without a mesh: each would do all of the work, into the same files."""
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    options = argparse.Namespace(run=str(tmp_path), overrides=[])
    with pytest.raises(UserError, match=r"srun started 4 processes \(SLURM_STEP_NUM_TASKS = 4\), .* give mesh.weights=whole"):
        on_mesh(options).__enter__()
    options.overrides = ["mesh=null"]
    with on_mesh(options) as mesh:
        assert mesh is None


def test_what_one_process_does(trained, monkeypatch, capsys):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert cli.main(["chat", str(trained)]) == 2
    assert "moejax chat is one process with all devices of its machine" in capsys.readouterr().err


def test_an_empty_section_of_a_script_is_all_devices_as_in_a_config(trained, tmp_path):
    assert joined(tmp_path, None) is None and joined(tmp_path, {}) == MeshConfig()
    assert joined(trained, {}) == MeshConfig(weights="experts")
