"""Shared fixtures: the PyTorch vectors, and the tiny Mixtral they were made with."""

import gc
import itertools
import json
import mmap
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")


def xla_flags(wanted):
    """XLA ends a process that names a flag that it does not know: only those whose names stand in its library."""
    libraries = Path(find_spec("jaxlib").submodule_search_locations[0]).glob("libjax_common*")
    with next(libraries).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library:
        # As a whole string: a flag that is gone may remain as a field of a message.
        return " ".join(f"--{name}={value}" for name, value in wanted.items() if library.find(f"\0{name}\0".encode()) >= 0)


# XLA ends a process in which a virtual device waits for another for 40 s, which a busy machine makes it do.
PATIENT = {"xla_cpu_collective_call_terminate_timeout_seconds": 900, "xla_cpu_collective_timeout_seconds": 900}
# Tests compile far more than they compute, and these take four fifths of the compile time away.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": "true",
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": 1,
}
USUAL = os.environ.get("MOEJAX_TEST_XLA") == "usual"  # compiled as for a user
if "PYTEST_XDIST_WORKER" not in os.environ:  # else the first process has done it
    flags = ["--xla_force_host_platform_device_count=4", os.environ.get("XLA_FLAGS", ""), xla_flags(PATIENT | ({} if USUAL else QUICK))]
    # What one test compiles, others and their processes read; nothing is left in the user's cache, or comes from there.
    PROGRAMS = tempfile.TemporaryDirectory(prefix="moejax-tests-", ignore_cleanup_errors=True)
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": PROGRAMS.name,
        "MOEJAX_CACHE": f"{PROGRAMS.name}/moejax",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_FLAGS": " ".join(filter(None, flags)),  # devices for meshes; what has none runs on the first, as on a machine with one
    }

import jax
import pytest

# Equal steps are one function here, which jax traces, lowers and compiles once for all tests: before anything takes it by its name.
import shared_steps  # noqa: F401  isort: skip
from support import batch_of, hub_folder, read_vectors, tiny_experiments

from moejax import device, progress
from moejax.commands.shown import Shown
from moejax.models.config import from_hub_config

progress.listen(Shown())  # as the command line does


@pytest.fixture(scope="session")
def mixtral_vectors():
    return read_vectors("mixtral")


@pytest.fixture(scope="session")
def mixtral_folder(mixtral_vectors, tmp_path_factory):
    """The reference's weights as a folder in Hub layout."""
    return hub_folder(mixtral_vectors, tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="session")
def reference_config(mixtral_folder):
    return from_hub_config(json.loads((mixtral_folder / "config.json").read_text()))


@pytest.fixture(scope="session")
def reference_batch(mixtral_vectors):
    """The right-padded, prompt-masked batch in our form."""
    return batch_of(mixtral_vectors)


@pytest.fixture(scope="session")
def blackmamba_vectors():
    return read_vectors("blackmamba")


@pytest.fixture(scope="session")
def blackmamba_folder(blackmamba_vectors, tmp_path_factory):
    """The oracle's weights as a folder in Hub layout."""
    return hub_folder(blackmamba_vectors, tmp_path_factory.mktemp("blackmamba"))


def pytest_collection_finish():
    """What is imported and collected stays: the garbage collector, a tenth of the tests' time as Python sets it, looks at what is newer."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


MOST_MAPPINGS = 40_000
"""Linux allows a process 65,530 (vm.max_map_count), every compiled program takes some, and XLA ends the process where one fails."""
_ended = itertools.count(1)


def mappings():
    """How many parts of this process's memory are mapped; 0 where the system does not say."""
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.is_file() else 0


def pytest_runtest_teardown(item, nextitem):
    """A folder's programs go with its last test: others share few of them, and all together are gigabytes. Earlier, where they are many."""
    other_folder = nextitem is not None and nextitem.path.parent != item.path.parent
    if other_folder or (next(_ended) % 20 == 0 and mappings() > MOST_MAPPINGS):
        jax.clear_caches()
        gc.collect()
        device.return_freed()


@pytest.fixture
def make_experiment(tmp_path):
    """make_experiment(section={field: value}) -> Experiment on the bundled problems, whose runs lie in tmp_path."""
    return tiny_experiments(tmp_path)
