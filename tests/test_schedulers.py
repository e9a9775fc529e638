"""Two processes meet by the environment that SLURM's srun and OpenMPI's mpirun give them, on this machine, and wait for each other.
`make test-long`."""

import os
import socket
import subprocess
import sys

import pytest
from support import ROOT, ended

pytestmark = pytest.mark.long

SCRIPT = """
from moejax import processes
from moejax.config_mesh import MeshConfig
with processes.together(MeshConfig(coordinator=COORDINATOR), {"asked": "{}"}):
    import jax
    print(processes.count(), jax.process_index(), len(jax.devices()), *processes.gathered(str(jax.process_index())))
"""
_FIRST = 65535 - 2**12 + 1
"""Of the ports that jax chooses one of, by the number of a job."""


def free_job():
    """The number of a job whose port is free."""
    for job in range(os.getpid() % 1000, 2**12):
        try:
            socket.create_server(("127.0.0.1", _FIRST + job)).close()
        except OSError:
            continue
        return job
    raise AssertionError("no port is free")


def srun(job, number):
    return {
        "SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": 2, "SLURM_STEP_NUM_TASKS": 2, "SLURM_PROCID": number,
        "SLURM_LOCALID": number,
    }  # fmt: skip


def mpirun(job, number):
    return {f"OMPI_COMM_WORLD_{name}": value for name, value in {"SIZE": 2, "RANK": number, "LOCAL_RANK": number}.items()}


def mpirun_4(job, number):
    return mpirun(job, number) | {"OMPI_MCA_orte_hnp_uri": f"{job * 2**12}.0;tcp://127.0.0.1:1"}


@pytest.mark.parametrize("scheduler", [srun, mpirun_4, mpirun])
def test_they_meet(scheduler):
    job = free_job()
    coordinator = f"127.0.0.1:{_FIRST + job}" if scheduler is mpirun else None  # version 5 does not say where the first one is
    script, started = SCRIPT.replace("COORDINATOR", repr(coordinator)), []
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_"))}
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    for number in range(2):
        own = {name: str(value) for name, value in scheduler(job, number).items()}
        environment = clean | own | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([sys.executable, "-c", script], env=environment, **pipes))
    for number, (code, out, error) in enumerate(ended(started)):
        assert code == 0, error
        assert out.splitlines()[-1].split() == ["2", str(number), "4", "0", "1"]


LATE = """
import sys, time
import jax
import numpy as np
from moejax import processes
from moejax.config_mesh import MeshConfig
number = int(sys.argv[2])
with processes.together(MeshConfig(coordinator=sys.argv[1], processes=2, process_id=number), {"asked": "{}"}):
    time.sleep(0 if number else 35)  # it compiles longer than gloo waits for a first sum of all devices
    everyone = jax.sharding.NamedSharding(jax.make_mesh((4,), ("all",)), jax.sharding.PartitionSpec("all"))
    ones = jax.make_array_from_callback((4, 3), everyone, lambda _: np.arange(3.0, dtype=np.float32)[None] + 1)
    print(jax.jit(lambda a: a.sum(), out_shardings=everyone.update(spec=jax.sharding.PartitionSpec()))(ones))
    time.sleep(0 if number else 45)  # it writes longer than jax waits for those that have ended
"""


def test_one_is_later_than_the_others():
    with socket.create_server(("127.0.0.1", 0)) as server:
        coordinator = f"127.0.0.1:{server.getsockname()[1]}"
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    more = {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    lines = [[sys.executable, "-c", LATE, coordinator, str(number)] for number in range(2)]
    for code, out, error in ended([subprocess.Popen(line, env=os.environ | more, **pipes) for line in lines]):
        assert code == 0 and out.splitlines()[-1] == "24.0", error
