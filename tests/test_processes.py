"""Several processes: how they are found, and what is said where they do not meet. What two do together: training/test_two_processes.py."""

import contextlib
import json
import socket

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from support import ROOT

from moejax import config, processes, progress
from moejax.config_mesh import MeshConfig
from moejax.errors import UserError
from moejax.runs import folders
from moejax.training import loop

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "4"}


@pytest.mark.parametrize(
    ("mesh", "environment", "several"),
    [
        (None, SLURM, False),
        (MeshConfig(), {}, False),
        (MeshConfig(), SLURM, True),
        (MeshConfig(), SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, False),
        (MeshConfig(), {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, False),  # a batch script's own shell, outside srun
        (MeshConfig(), {"OMPI_COMM_WORLD_SIZE": "2"}, True),
        (MeshConfig(coordinator="a:1", processes=2, process_id=0), {}, True),
        (MeshConfig(coordinator="a:1", processes=1, process_id=0), SLURM, False),
        (MeshConfig(coordinator="auto"), {}, True),
    ],
)  # fmt: skip
def test_who_says_that_there_are_several(mesh, environment, several, monkeypatch):
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes.started_with(mesh) == several


def test_what_jax_is_given(monkeypatch):
    """SLURM and OpenMPI 4 say all themselves, OpenMPI 5 not where the first process is."""
    for name in ("OMPI_COMM_WORLD_RANK", "OMPI_MCA_orte_hnp_uri", "JAX_LOCAL_DEVICE_IDS"):
        monkeypatch.delenv(name, raising=False)
    address, met = {"coordinator_address": "a:1"}, MeshConfig(coordinator="a:1")
    by_hand = processes._options(MeshConfig(coordinator="a:1", processes=2, process_id=1))
    assert by_hand == {**address, "num_processes": 2, "process_id": 1, "cluster_detection_method": "deactivate"}
    assert processes._options(MeshConfig()) == {} and processes._options(met) == address
    assert processes._options(MeshConfig(coordinator="auto")) == {}  # jax asks a TPU's hosts
    for name, value in {"SIZE": 8, "RANK": 5, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", str(value))
    assert processes._options(met) == {**address, "num_processes": 8, "process_id": 5, "local_device_ids": [1]}
    with pytest.raises(UserError, match=r"mpirun does not say where .* mesh.coordinator=HOST:PORT"):
        processes._options(MeshConfig())
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "0,1")
    assert "local_device_ids" not in processes._options(met)
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "1.0;tcp://10.0.0.1:1")
    assert processes._options(MeshConfig()) == {}


def experiment(*changes):
    return config.load(ROOT / "configs/demo.yaml", changes)


@pytest.fixture
def no_handler(monkeypatch):
    monkeypatch.setattr(processes, "_at_abort", lambda message: None)


def test_a_coordinator_that_does_not_answer(monkeypatch, no_handler):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(processes, "JOIN_SECONDS", 0)
    asked = experiment(f"mesh.coordinator=127.0.0.1:{port}", "mesh.processes=2", "mesh.process_id=1")
    with pytest.raises(UserError, match=rf"127.0.0.1:{port} does not answer process 1 within 0 s .*refused.*start process 0 there"):
        processes.joined(asked).__enter__()


def test_a_coordinator_whose_host_is_not_known(monkeypatch, no_handler):
    def unknown(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(processes.socket, "create_connection", unknown)
    asked = experiment("mesh.coordinator=nowhere.invalid:1234", "mesh.processes=2", "mesh.process_id=1")
    with pytest.raises(UserError, match="no host of that name is known here"):
        processes.joined(asked).__enter__()


def test_one_process_is_alone(tmp_path):
    asked = experiment("mesh.devices=2")
    with processes.joined(asked) as found:
        assert found is asked and processes.count() == 1 and processes.is_first()
    processes.same({"config": "a"})
    processes.wait_for_all("here")
    assert not processes.stop_agreed(1)


def test_what_differs_between_two_configs_is_named():
    first, own = (json.loads(processes.as_text(experiment(f"training.learning_rate={rate}"))) for rate in ("1e-3", "2e-3"))
    assert processes._differences(first, own) == ["training.learning_rate = 0.001 in process 0, 0.002 here"]


def test_a_quiet_process_is_heard_with_warnings():
    told = []

    class Shown(progress.Listener):
        say = note = lambda self, text: told.append(text)

    quiet = processes._Quiet(Shown())
    quiet.say("loss 1.0")
    quiet.note("warning: the disk is full")
    assert told == ["process 0: warning: the disk is full"]


def test_a_run_goes_on_with_other_devices(tmp_path):
    begun = experiment(f"runs_dir={tmp_path}", "mesh.devices=4", "mesh.weights=experts")
    folders.write_config(begun)
    for changes in ([], ["mesh.devices=1"], ["mesh.devices=4", "mesh.weights=spread"]):
        folders.prepare(experiment(f"runs_dir={tmp_path}", *changes), resume=True)


def test_a_part_of_an_array_is_whole_on_the_host(monkeypatch):
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",), axis_types=(AxisType.Auto,))
    array = np.arange(24, dtype=np.float32).reshape(3, 4, 2)
    there = jax.device_put(array, NamedSharding(mesh, P(None, "data")))
    assert isinstance(processes.on_host(there), np.ndarray)

    class Elsewhere:
        """As an array of which other processes hold parts."""

        is_fully_addressable = is_fully_replicated = False
        sharding, shape, dtype, nbytes, ndim = there.sharding, there.shape, there.dtype, there.nbytes, there.ndim

    real = processes._everywhere(mesh)
    monkeypatch.setattr(processes, "_everywhere", lambda mesh: lambda a, *index: real(there, *index))
    for at_once in (0, 1 << 20):
        monkeypatch.setattr(processes, "_AT_ONCE", at_once)
        np.testing.assert_array_equal(processes.on_host(Elsewhere()), array)


@pytest.mark.parametrize(
    ("error", "told"),
    [(ValueError("coordinator_address should be defined."), r"mesh\.coordinator = auto: jax finds neither .* expected HOST:PORT"),
     (RuntimeError("timed out"), "several processes: timed out")],
)  # fmt: skip
def test_auto_where_nobody_is_met(error, told, monkeypatch):
    """A host that does not answer is not called a missing scheduler."""

    def initialize(**_):
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # of this process's later tests
    monkeypatch.setattr(processes, "_at_abort", lambda _: None)
    with pytest.raises(UserError, match=told), processes.together(MeshConfig(coordinator="auto"), {}):
        pass


@pytest.mark.parametrize(
    ("environment", "mesh", "told"),
    [
        ({"SLURM_STEP_NUM_TASKS": "4"}, None, r"srun started 4 processes \(SLURM_STEP_NUM_TASKS = 4\), .* mesh.weights=whole .* unset"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, None, r"mpirun started 2 processes \(OMPI_COMM_WORLD_SIZE = 2\)"),
        ({"WORLD_SIZE": "8", "MASTER_ADDR": "a"}, MeshConfig(), r"torchrun or accelerate started 8 processes .* start moejax by itself"),
        ({"WORLD_SIZE": "8", "MASTER_ADDR": "a"}, None, "torchrun"),
        ({"WORLD_SIZE": "8"}, None, None),  # anybody's name
        ({"WORLD_SIZE": "8", "MASTER_ADDR": "a"}, MeshConfig(coordinator="a:1", processes=8, process_id=0), None),
        ({"SLURM_STEP_NUM_TASKS": "4"}, MeshConfig(), None),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None, None),  # a shell of salloc or sbatch
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None, None),
    ],
)  # fmt: skip
def test_copies_of_a_run_are_refused(environment, mesh, told, monkeypatch):
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with contextlib.nullcontext() if told is None else pytest.raises(UserError, match=told):
        processes.check_started(mesh, "this run")


def test_a_run_of_one_device_is_not_trained_by_several_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(UserError, match="and each would do all of this run"):
        loop.trained(experiment(f"runs_dir={tmp_path}"), resume=False)
    assert not any(tmp_path.iterdir())


def test_all_wait_for_the_last(monkeypatch, no_handler):
    """The first one may still write what it trained: jax ends it where another has been gone for a while."""
    came = []
    for name in ("_meet", "_acquaint", "same", "wait_for_all"):
        monkeypatch.setattr(processes, name, lambda *_, name=name, **__: came.append(name))
    with processes.together(MeshConfig(coordinator="a:1", processes=2, process_id=0), {}):
        came.append("work")
    assert came == ["_meet", "same", "_acquaint", "work", "wait_for_all"]
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)  # a script's second call
    with processes.together(MeshConfig(coordinator="a:1", processes=2, process_id=0), {}):
        came.append("more")
    assert came[5:] == ["same", "_acquaint", "more", "wait_for_all"]


def test_a_script_parts_where_it_ends(monkeypatch, no_handler):
    came, asked = [], MeshConfig(coordinator="a:1", processes=2, process_id=0)
    for name in ("_meet", "_acquaint", "same", "wait_for_all", "_leave"):
        monkeypatch.setattr(processes, name, lambda *_, name=name, **__: came.append(name))
    monkeypatch.setattr(processes.atexit, "register", came.append)
    processes.join(None, {})
    assert not came
    processes.join(asked, {})
    processes.join(asked, {})  # a second model of the same script
    assert came == ["_meet", "same", "_acquaint", processes._part, "same"]
    monkeypatch.setattr(processes.sys, "last_value", None, raising=False)
    came.pop(3)()
    assert came[4:] == ["wait_for_all"] and not processes._joined
    monkeypatch.setattr(processes.sys, "last_value", ValueError(), raising=False)
    monkeypatch.setattr(processes, "_joined", [contextlib.nullcontext()])
    processes._part()
    assert came[5] == "_leave"


def test_the_least_of_what_processes_have(monkeypatch):
    assert processes.least(5) == 5 and processes.least(None) is None
    for others, expected in ((["7", "3"], 3), (["7", "null"], None)):
        monkeypatch.setattr(processes, "gathered", lambda text, others=others: [text, *others])
        assert processes.least(5) == expected
