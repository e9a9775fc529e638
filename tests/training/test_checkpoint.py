"""Checkpoints that cannot be written, and those that are not what was written."""

import errno
import logging
import shutil
import sys
from functools import partial
from operator import mul
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.training import checkpoint
from moejax.training.checkpoint import Checkpoints, Position, checksums
from moejax.training.step import TrainState

STATE = TrainState({"a": jax.random.normal(jax.random.key(0), (30, 400)), "b": jnp.ones(5, jnp.bfloat16)}, {}, jnp.zeros((), jnp.int32))


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (ValueError("RESOURCE_EXHAUSTED: Error writing 'x'\nmore"), "the disk is full"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EROFS, "Read-only file system"), r"\[Errno 30\] Read-only file system"),
    ],
)
@pytest.mark.parametrize("when", ["save", "wait_until_finished"])
def test_one_message_says_why_and_what_is_kept(error, why, when, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, best=False)
    checkpoints.save(1, STATE, Position(0, 1), None)
    checkpoints.wait()

    def fails(*_, **__):
        raise error

    with monkeypatch.context() as patched, pytest.raises(UserError, match=rf"checkpoints: .* cannot be written: {why}\. .* 1 is whole"):
        patched.setattr(checkpoints.manager, when, fails)
        checkpoints.save(2, STATE, Position(0, 2), None)
        checkpoints.wait()
    checkpoints.close()
    assert Checkpoints(tmp_path / "checkpoints", 2, best=False).restore(STATE, 1)[1] == Position(0, 1)


def test_memory_is_returned_once_after_each_save_that_is_on_disk(tmp_path, monkeypatch):
    returned, writing = [], True
    monkeypatch.setattr(checkpoint.device, "return_freed", lambda: returned.append(1))
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, best=False)
    monkeypatch.setattr(checkpoints.manager, "is_saving_in_progress", lambda: writing)
    for step in (1, 2):
        checkpoints.tidy()
        writing = True
        checkpoints.save(step, STATE, Position(0, step), None)
        checkpoints.tidy()
        assert len(returned) == step - 1
        writing = False
        checkpoints.tidy()
        checkpoints.tidy()
        assert len(returned) == step
    checkpoints.close()


@pytest.fixture
def three(tmp_path):
    """Checkpoints 1, 2, 3 of STATE times their number."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", 3, best=False)
    for step in (1, 2, 3):
        checkpoints.save(step, jax.tree.map(partial(mul, step), STATE), Position(0, step), None)
    checkpoints.close()
    return tmp_path / "checkpoints"


def arrays(folder):
    """Files that hold array data, the largest first."""
    found = [p for p in (folder / "state").rglob("*") if p.is_file() and "/d/" in str(p)]
    return sorted(found, key=lambda p: -p.stat().st_size)


def cut(folder):
    file = arrays(folder)[0]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def zeros(folder):
    file = arrays(folder)[0]
    file.write_bytes(bytes(file.stat().st_size))


def flip(folder):
    file = arrays(folder)[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def other(folder):
    """Whole files of another step: nothing that orbax itself checks is wrong."""
    shutil.rmtree(folder / "state")
    shutil.copytree(folder.parent / "1" / "state", folder / "state")


def position(folder):
    file = folder / "position" / "metadata"
    file.write_text(file.read_text().replace('"step_in_epoch": 3', '"step_in_epoch": 4'))


def no_metadata(folder):
    for path in (folder / "state").glob("_METADATA"):
        path.write_text("{")


def test_a_state_of_other_settings_is_not_damaged(three):
    """As where training.optimizer was changed. Nothing is set aside, and the message names what to put back."""
    other_state = STATE._replace(opt_state={"moments": jnp.zeros(3)})
    with pytest.raises(UserError, match=r"checkpoint 3 in .* holds other arrays than this run has: it is of another training\.optimizer"):
        Checkpoints(three, 3, best=False).newest(other_state)
    assert not (three.parent / "damaged").exists()


@pytest.mark.parametrize("damage", [cut, zeros, flip, other, position, no_metadata, lambda f: shutil.rmtree(f / "state")])
def test_the_newest_whole_one_is_taken(damage, three, capsys):
    damage(three / "3")
    checkpoints = Checkpoints(three, 3, best=False)
    state, place = checkpoints.newest(STATE)
    assert place == Position(0, 2)
    np.testing.assert_array_equal(state.trainable["a"], 2 * STATE.trainable["a"])
    (told,) = capsys.readouterr().out.splitlines()
    assert "checkpoint 3 in" in told and "the run continues from step 2" in told
    assert (three.parent / "damaged" / "checkpoint-3").is_dir()
    checkpoints.save(3, STATE, Position(0, 3), None)  # the step is done again, and saved
    checkpoints.close()
    assert Checkpoints(three, 3, best=False).newest(STATE)[1] == Position(0, 3)
    assert capsys.readouterr().out == ""


def test_none_is_whole(three):
    """Nothing is moved: a second try must not begin at step 0."""
    for step in (1, 2, 3):
        zeros(three / str(step))
    checkpoints = Checkpoints(three, 3, best=False)
    with pytest.raises(UserError, match=r"checkpoint 3 in .*\. None of the older ones \(2, 1\) is whole either"):
        checkpoints.newest(STATE)
    checkpoints.close()
    assert not (three.parent / "damaged").exists() and (three / "3").is_dir()


def test_reads_and_writes_that_were_given_up_print_no_traceback_each(tmp_path, monkeypatch):
    """As threads of tensorstore, and asyncio, would after the first that failed; what else cannot be raised is reported as ever."""
    told: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(str(unraisable.exc_value)))
    monkeypatch.setattr(checkpoint, "_tell_once", checkpoint._tell_once.__wrapped__)
    Checkpoints(tmp_path, 1, best=False).close()
    for text in ("Event loop is closed", "another"):
        sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(text)))
    assert told == ["another"]
    assert not any(logging.getLogger(name).isEnabledFor(logging.ERROR) for name in ("absl", "asyncio"))


def test_a_checkpoint_of_a_version_without_checksums(three, capsys):
    (three / "3" / "position" / "metadata").write_text('{"epoch": 1, "step_in_epoch": 5}')
    assert Checkpoints(three, 3, best=False).newest(STATE)[1] == Position(1, 5)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
def test_every_single_changed_element_changes_the_checksum(dtype):
    plain = np.zeros(65, dtype)
    seen = set()
    for place in range(65):
        changed = plain.copy()
        changed[place] = 1
        seen.add(tuple(checksums({"x": jnp.asarray(changed)})["x"]))
    assert len(seen | {tuple(checksums({"x": jnp.asarray(plain)})["x"])}) == 66


@pytest.mark.parametrize("damage", [cut, zeros, flip])
def test_verify_names_what_is_damaged_and_changes_nothing(damage, three):
    assert list(checkpoint.verify(three.parent)) == [(1, ""), (2, ""), (3, "")]
    damage(three / "2")
    (first, second, third) = checkpoint.verify(three.parent)
    assert (first, third) == ((1, ""), (3, "")) and second[1] and (three / "2").is_dir()
