"""Checkpoints that cannot be written."""

import errno

import jax.numpy as jnp
import pytest

from moejax.errors import UserError
from moejax.training.checkpoint import Checkpoints, Position
from moejax.training.step import TrainState


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
    state = TrainState({"a": jnp.ones(3)}, {}, jnp.zeros((), jnp.int32))
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, best=False)
    checkpoints.save(1, state, Position(0, 1), None)
    checkpoints.wait()

    def fails(*_, **__):
        raise error

    with monkeypatch.context() as patched, pytest.raises(UserError, match=rf"checkpoints: .* cannot be written: {why}\. .* 1 is whole"):
        patched.setattr(checkpoints.manager, when, fails)
        checkpoints.save(2, state, Position(0, 2), None)
        checkpoints.wait()
    checkpoints.close()
    assert Checkpoints(tmp_path / "checkpoints", 2, best=False).restore(state, 1)[1] == Position(0, 1)
