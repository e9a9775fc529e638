"""Several processes that run one program on one mesh: how they meet, how they are compared, and how they end together.

jax does the work (`jax.distributed`): here are its time limits, and plain words where it would end a process with a stack trace.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from typing import Any

import numpy as np

from moejax.config import Experiment
from moejax.config_mesh import AUTO, MeshConfig
from moejax.errors import UserError, first_line
from moejax.progress import Listener, listen, listener

JOIN_SECONDS = 180
"""How long a process waits for the others to come."""
HEARTBEAT_SECONDS = 40
"""Without a sign of life for so long a process is dead, and the others end."""
END_SECONDS = 86400
"""How long the first waits for the others to end, as far as jax lets it. (One that is dead is not waited for.)"""

_GONE = (
    "another process of this run has ended, or cannot be reached any more (its own message says why): this one ends too. "
    "--resume continues from the last checkpoint, with fewer processes too"
)
_PEER = ("gloo", "nccl", "coordination", "heartbeat", "connection reset", "connection closed", "socket closed")


def is_first() -> bool:
    """Whether this process writes what is written once: of one process, always."""
    import jax

    return jax.process_index() == 0


def count() -> int:
    import jax

    return jax.process_count()


_SCHEDULERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun"}
"""Variables with the number of processes -> who sets them, in a process that they started and not in the shell of an allocation."""


def scheduled() -> int:
    """The number of processes that SLURM's srun or OpenMPI's mpirun started, by their environment; 1 without them."""
    return max(int(os.environ.get(name) or 1) for name in _SCHEDULERS)


def check_started(mesh: MeshConfig | None, what: str) -> None:
    """Raises UserError where several processes were started that would not know of each other: each would do all of `what`."""
    by = dict(_SCHEDULERS) if mesh is None else {}
    if "MASTER_ADDR" in os.environ and not started_with(mesh):  # of PyTorch's launchers
        by["WORLD_SIZE"] = "torchrun or accelerate"
    name = next((name for name in by if (os.environ.get(name) or "1").isdigit() and int(os.environ.get(name) or 1) > 1), None)
    if name is None:
        return
    told = f"{by[name]} started {os.environ[name]} processes ({name} = {os.environ[name]}), and each would do all of {what}"
    if name == "WORLD_SIZE":
        raise UserError(f"{told}: start moejax by itself, one process with mesh.weights=whole uses all GPUs; several machines by srun, "
                        f"mpirun or mesh.coordinator. For a process by itself unset {name}")  # fmt: skip
    raise UserError(f"{told}: give mesh.weights=whole (or spread, experts) and they share it, or for a process by itself unset {name}")


def started_with(mesh: MeshConfig | None) -> bool:
    """Whether there are several processes: by the config, or by the scheduler's environment. With `auto` jax knows when they have met."""
    if mesh is None:
        return False
    if mesh.coordinator == AUTO:
        return True
    return (scheduled() if mesh.processes is None else mesh.processes) > 1


@contextmanager
def joined(experiment: Experiment) -> Iterator[Experiment]:
    """`together`, of those that train. Gives the experiment without what is this process's alone."""
    if not started_with(experiment.mesh):
        yield experiment
        return
    own = experiment.changed("mesh", coordinator=None, processes=None, process_id=None)
    with together(experiment.mesh, {"config": as_text(own)}):
        yield own


@contextmanager
def together(mesh: MeshConfig | None, asked: Mapping[str, str]) -> Iterator[None]:
    """Around all that several processes do together, before anything asks jax for devices; without several processes nothing happens.

    asked: by name, JSON that all must have alike. Processes but the first report warnings only. Raises UserError where they do not meet in
    time, were asked for different things, or one is lost.
    """
    if not started_with(mesh):
        yield
        return
    assert mesh is not None
    import jax

    if not jax.distributed.is_initialized():  # as it is where a script trains and then loads
        _meet(mesh)
    heard = listener()
    if not is_first():
        listen(_Quiet(heard))
    try:
        same(asked, texts=True)
        _acquaint()
        yield
        # The first may still write a model: jax's own wait at the end of a process, of the last, is five minutes.
        wait_for_all("the end")
    except BaseException as error:
        # The others are not waited for: they do not come to where this process would wait.
        atexit.register(_leave)
        if isinstance(error, Exception) and not isinstance(error, UserError) and any(mark in str(error).lower() for mark in _PEER):
            raise UserError(f"{_GONE} ({first_line(error)})") from error
        raise
    finally:
        listen(heard)


def join(mesh: MeshConfig | None, asked: Mapping[str, str]) -> None:
    """`together`, of a script, until it ends. What it asks first must come before jax is asked for devices, as there."""
    if not started_with(mesh):
        return
    if _joined:
        same(asked, texts=True)
        return
    _joined.append(together(mesh, asked))
    _joined[0].__enter__()
    atexit.register(_part)


_joined: list[AbstractContextManager[None]] = []


def _part() -> None:
    """At a script's end: the others are waited for, unless it ends by an error."""
    if getattr(sys, "last_value", None) is not None:
        _leave()
    try:
        _joined.pop().__exit__(None, None, None)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        _leave()


class _Quiet(Listener):
    """Of a process that is not the first: warnings alone."""

    def __init__(self, shown: Listener):
        import jax

        self._shown, self._own = shown, f"process {jax.process_index()}: "

    def note(self, text: str) -> None:
        self._shown.note(self._own + text)


def _meet(mesh: MeshConfig) -> None:
    import jax

    where = "the scheduler's first host" if mesh.coordinator in (None, AUTO) else mesh.coordinator
    many = "" if mesh.processes is None else f" of {mesh.processes}"
    missing = (
        f"the processes{many} have not met at {where} within {JOIN_SECONDS} s: start all of them, with one mesh.coordinator that each can "
        "reach (a firewall? a host's name that others do not know?)"
    )
    _at_abort(missing)
    options = _options(mesh)
    if mesh.coordinator is not None and options.get("process_id"):
        _wait_for(mesh.coordinator, options["process_id"])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            **options, initialization_timeout=JOIN_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=END_SECONDS,
        )  # fmt: skip
        jax.devices()  # where each hears of the others' devices
    except (RuntimeError, ValueError) as error:
        if mesh.coordinator == AUTO and isinstance(error, ValueError):  # as where no address is known
            raise UserError(
                f"mesh.coordinator = auto: jax finds neither a scheduler nor a TPU slice here ({first_line(error)}): expected HOST:PORT"
            ) from error
        raise UserError(f"several processes: {first_line(error)}") from error
    _at_abort(_GONE)


def _acquaint() -> None:
    """A first sum over all devices. gloo waits 30 s for the others to come to the first one alone: all are here now, and are not where one
    compiles the first step longer than another."""
    import jax

    everyone = jax.sharding.Mesh(np.array(jax.devices()), ("everyone",))
    over, whole = (jax.sharding.NamedSharding(everyone, jax.sharding.PartitionSpec(*axes)) for axes in (["everyone"], []))
    zeros = jax.make_array_from_callback((everyone.size,), over, lambda _: np.zeros(1, np.int32))
    jax.block_until_ready(jax.jit(lambda a: a.sum(), out_shardings=whole)(zeros))


def _options(mesh: MeshConfig) -> dict[str, Any]:
    """For `jax.distributed.initialize`, which asks SLURM and OpenMPI 4 itself for what is not given. A process that they start has the
    device of its number on its host, others have all that they see."""
    if mesh.coordinator == AUTO:  # on a TPU slice by its hosts' metadata
        return {}
    address = {} if mesh.coordinator is None else {"coordinator_address": mesh.coordinator}
    if mesh.coordinator is not None and mesh.coordinator.rsplit(":", 1)[0] in _HERE:
        address["coordinator_bind_address"] = mesh.coordinator  # jax would listen to every network
    if mesh.process_id is not None:
        own = {"num_processes": mesh.processes, "process_id": mesh.process_id}
        return {**address, **own, "cluster_detection_method": "deactivate"}
    if "OMPI_COMM_WORLD_RANK" not in os.environ or "OMPI_MCA_orte_hnp_uri" in os.environ:
        return address
    if mesh.coordinator is None:  # OpenMPI 5
        raise UserError("mpirun does not say where the first process runs: give mesh.coordinator=HOST:PORT, a free port of its host")
    count, number, local = (int(os.environ[f"OMPI_COMM_WORLD_{name}"]) for name in ("SIZE", "RANK", "LOCAL_RANK"))
    devices = {} if "JAX_LOCAL_DEVICE_IDS" in os.environ else {"local_device_ids": [local]}
    return {**address, "num_processes": count, "process_id": number, **devices}


def _wait_for(coordinator: str, process: int) -> None:
    """Until the coordinator answers. Raises UserError where it does not, or its host is not known."""
    host, port = coordinator.rsplit(":", 1)
    end = time.monotonic() + JOIN_SECONDS
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except socket.gaierror as error:
            raise UserError(f"mesh.coordinator = {coordinator}: no host of that name is known here ({error.strerror})") from None
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"mesh.coordinator = {coordinator} does not answer process {process} within {JOIN_SECONDS} s ({error})"
                    ": start process 0 there (mesh.process_id=0), and let this host reach its port"
                ) from None
        time.sleep(0.5)


_HERE = ("127.0.0.1", "localhost")

_handlers: list[Any] = []


def _at_abort(message: str) -> None:
    """jax's runtime ends a process that has lost the others by abort(): this is then the last line, in the place of a signal's number.

    A handler of C's: Python's own run only once the interpreter goes on, which it does not.
    """
    line = f"\nerror: {message}\n".encode()

    def handler(_: int) -> None:
        os.write(2, line)
        os._exit(2)

    _handlers.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(handler))  # as long as the process lives
    install = ctypes.CDLL(None).signal
    install.argtypes, install.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    install(signal.SIGABRT, ctypes.cast(_handlers[-1], ctypes.c_void_p))


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2)


def as_text(experiment: Experiment) -> str:
    """What of a config all processes must have alike."""
    return json.dumps(experiment.model_dump(mode="json", exclude={"device", "made_of"}), sort_keys=True)


def same(parts: Mapping[str, Any], *, texts: bool = False) -> None:
    """Raises UserError, in every process, where these contents (by name, of all processes alike) are not those of process 0.

    texts: that they are JSON, whose differences are named. Without several processes nothing is compared.
    """
    if count() == 1:
        return
    import jax
    from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather

    own = np.array([np.frombuffer(hashlib.sha256(repr(text).encode()).digest(), np.uint8) for text in parts.values()])
    found = np.asarray(process_allgather(own))  # [processes, parts, 32]
    others = [process for process in range(len(found)) if not np.array_equal(found[process], found[0])]
    if not others:
        return
    mine = jax.process_index()
    other = mine if mine in others else others[0]
    part = next(i for i in range(len(own)) if not np.array_equal(found[other][i], found[0][i]))
    name, text = list(parts.items())[part]
    where = ""
    if texts:
        data = np.frombuffer(str(text).encode(), np.uint8)
        longest = int(np.max(process_allgather(np.array([data.size]))))
        first = bytes(np.asarray(broadcast_one_to_all(np.pad(data, (0, longest - data.size)))).tobytes()).rstrip(b"\0")
        where = "" if mine == 0 else f" ({'; '.join(_differences(json.loads(first), json.loads(str(text))))})"
    hashes = " and ".join(f"{found[p][part].tobytes().hex()[:16]} in process {p}" for p in (0, other))
    raise UserError(f"the processes have not the same {name}: {hashes}{where}. Start all with the same")


def gathered(text: str) -> list[str]:
    """The texts of all processes, in their order. All call it."""
    if count() == 1:
        return [text]
    from jax.experimental.multihost_utils import process_allgather

    data = np.frombuffer(text.encode(), np.uint8)
    longest = int(np.max(process_allgather(np.array([data.size]))))
    found = np.asarray(process_allgather(np.pad(data, (0, longest - data.size))))
    return [row.tobytes().rstrip(b"\0").decode() for row in found]


def least(value: int | None) -> int | None:
    """The least of what the processes have, so that all decide alike; None where one does not know. All call it."""
    found = [json.loads(text) for text in gathered(json.dumps(value))]
    return None if None in found else min(found)


def _differences(first: Any, own: Any, path: str = "") -> list[str]:
    if isinstance(first, dict) and isinstance(own, dict):
        keys = sorted(first.keys() | own.keys())
        return [d for key in keys for d in _differences(first.get(key), own.get(key), f"{path}.{key}" if path else key)]
    return [] if first == own else [f"{path} = {first!r} in process 0, {own!r} here"]


def on_host(array: Any) -> Any:
    """An array in the first process's memory: numpy's there; in the others what they have of it. All processes call it, for the same arrays
    in the same order."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array) if is_first() else array
    if array.nbytes <= _AT_ONCE or array.ndim < 2:
        whole = _everywhere(array.sharding.mesh)(array)
        return np.asarray(whole) if is_first() else array
    found = np.empty(array.shape, array.dtype) if is_first() else None
    for index in range(array.shape[0]):  # a layer at a time: each device gets all of it
        layer = _everywhere(array.sharding.mesh)(array, index)
        if found is not None:
            found[index] = np.asarray(layer)
    return array if found is None else found


def everywhere(array: Any) -> np.ndarray:
    """An array in the memory of every process, which may hold parts of it on their devices. All call it, for the same arrays."""
    whole = array.is_fully_addressable or array.is_fully_replicated
    return np.asarray(array if whole else _everywhere(array.sharding.mesh)(array))


_AT_ONCE = 1 << 26


@lru_cache
def _everywhere(mesh: Any) -> Any:
    """A program that gives an array, or an entry of it, to every device of a mesh."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    return jax.jit(lambda a, *index: a[index], out_shardings=NamedSharding(mesh, PartitionSpec()))


def wait_for_all(where: str) -> None:
    """Until every process has come to this place."""
    if count() > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices(where)


def stop_agreed(step: int) -> bool:
    """Whether a process was asked to end (SIGTERM), and all end after this step: jax finds a step that none has passed.

    Every process calls it after every step. jax listens for the signal since the processes met.
    """
    if count() == 1:
        return False
    from jax.experimental.multihost_utils import reached_preemption_sync_point

    return bool(reached_preemption_sync_point(step))
