"""Where nothing more can be written: a run stops with one message and everything before intact, or continues and says what is missing.

The failures are the kernel's: beyond a limit no file of this process grows (RLIMIT_FSIZE), and a user without rights may not write.
"""

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from support import ROOT, tiny_experiments

from moejax import runtime
from moejax.errors import UserError
from moejax.profiling.capture import Capture
from moejax.training import loop
from moejax.training.checkpoint import Checkpoints
from moejax.training.loop import Trainer
from moejax.training.metrics import MetricWriter


@contextmanager
def no_room(size=0):
    """No file grows beyond this many bytes."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


PLACES = {
    "start": (loop, "start", lambda *_: True, "a run cannot be kept there"),
    "metrics": (MetricWriter, "write", lambda self, step, record: step == 3, "what was measured cannot be written"),
    "checkpoint": (Checkpoints, "save", lambda self, step, *_: step == 4, "a checkpoint cannot be written"),
    "trace": (Capture, "close", lambda self: self._tracing, "the trace cannot be written"),
    "export": (Trainer, "_export", lambda *_: True, "cannot be written"),
}
"""Before which call the disk is full, for which arguments, and what the run says."""


SETTINGS = {"training": {"steps": 4, "gradient_accumulation": 1}, "checkpoint": {"every": 2}, "data": {"holdout": 0}}


def adapter(folder):
    return (folder / "adapter/adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What the run comes to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert loop.run(tiny_experiments(folder)(**SETTINGS), resume=False) == 0
    return adapter(folder / "runs/run")


@pytest.mark.parametrize("when", [pytest.param(name, marks=pytest.mark.long) if name in ("trace", "metrics") else name for name in PLACES])
def test_a_disk_that_is_full_at(when, undisturbed, make_experiment, tmp_path, monkeypatch, capfd):
    target, name, due, told = PLACES[when]
    profile = {"start_step": 3, "steps": 1} if when == "trace" else None
    experiment, usual, save = make_experiment(profile=profile, **SETTINGS), getattr(target, name), Checkpoints.save

    def call(*arguments, **named):
        if due(*arguments):
            stack.enter_context(no_room())
        return usual(*arguments, **named)

    def save_and_wait(self, *arguments):
        save(self, *arguments)
        self.wait()

    with pytest.raises(UserError, match=told), ExitStack() as stack, monkeypatch.context() as patch:
        if when == "start":
            stack.enter_context(no_room())
        else:
            if when != "checkpoint":  # what was being written when the disk became full is another row
                patch.setattr(Checkpoints, "save", save_and_wait)
            patch.setattr(target, name, call)
        loop.run(experiment, resume=False)
    said = capfd.readouterr()
    assert "Traceback" not in said.err + said.out and "Error" not in said.err, said.err
    folder = tmp_path / "runs" / "run"
    assert folder.exists() == (when != "start") and not list(tmp_path.rglob("*.tmp*"))
    assert loop.run(experiment, resume=when != "start") == 0 and adapter(folder) == undisturbed


def test_programs_that_cannot_be_cached_are_reported_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    runtime.replace_unreadable(tmp_path)
    with no_room():
        assert [int(jax.jit(lambda x, n=n: x * 3 + n)(jnp.int32(2))) for n in (101, 102)] == [107, 108]
    assert capsys.readouterr().err.count("compiled programs are not kept for the next start: OSError: [Errno 27] File too large") == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="takes another user's rights, which root alone may")
def test_a_folder_of_somebody_else_is_one_message(make_experiment, tmp_path):
    """As a read-only disk: the run is refused before it reads anything."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        experiment = make_experiment().model_copy(update={"runs_dir": folder})
        os.seteuid(65534)
        try:
            with pytest.raises(UserError, match=r"a run cannot be kept there .*Permission denied\): choose a folder that can"):
                loop.run(experiment, resume=False)
        finally:
            os.seteuid(0)
        assert not list(Path(folder).iterdir())


CHILD = """
import sys
from pathlib import Path
import jax.numpy as jnp
from moejax.errors import UserError
from moejax.training.checkpoint import Checkpoints, Position
from moejax.training.step import TrainState

folder = Path(sys.argv[1])
state = TrainState({"a": jnp.ones((200, 1000))}, {}, jnp.int32(0))
checkpoints = Checkpoints(folder / "checkpoints", 2, best=False)
checkpoints.save(1, state, Position(0, 1), None)
checkpoints.wait()
with (folder / "filler").open("wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(4096))
    except OSError as error:
        print(error.strerror)
try:
    checkpoints.save(2, state, Position(0, 2), None)
    checkpoints.close()
except UserError as error:
    print(error)
(folder / "filler").unlink()
again = Checkpoints(folder / "checkpoints", 2, best=False)
print(again.newest(state)[1])
again.save(2, state, Position(0, 2), None)
again.close()
print(Checkpoints(folder / "checkpoints", 2, best=False).newest(state)[1])
"""


def own_mounts():
    """Whether this user may mount a small disk that nobody else sees."""
    return shutil.which("unshare") and subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.long
@pytest.mark.skipif(not own_mounts(), reason="needs a disk of 4 MB: unshare -rm")
def test_a_checkpoint_on_a_disk_that_is_really_full(tmp_path):
    command = 'mount -t tmpfs -o size=4m tmpfs "$1" && exec "$2" -c "$3" "$1"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command, "sh", str(tmp_path), sys.executable, CHILD],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    full, told, one, two = done.stdout.splitlines()
    assert full == "No space left on device" and "a checkpoint cannot be written: the disk is full. Make room" in told
    assert "checkpoint 1 is whole" in told and one.endswith("step_in_epoch=1)") and two.endswith("step_in_epoch=2)")
    assert "Traceback" not in done.stderr and "Error" not in done.stderr, done.stderr
