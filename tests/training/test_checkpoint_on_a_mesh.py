"""Checkpoints of a mesh, restored on others: by what is saved alone. A run's: test_two_processes.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.errors import UserError
from moejax.training.checkpoint import Checkpoints, Position
from moejax.training.step import TrainState

EXPERTS, WHOLE = P(None, "data"), P()


def state(count, spec, seed=0):
    """An adapter of eight experts with its moments, and a shared one, on this many devices; None: on the first, without a mesh."""
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=(2, 8, 3, 5)).astype(np.float32), rng.normal(size=(2, 3, 5)).astype(jnp.bfloat16)]
    specs, placed = [spec, WHOLE], arrays
    if count is not None:
        mesh = Mesh(np.array(jax.devices()[:count]), ("data",), axis_types=(AxisType.Auto,))
        placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs, strict=True)]
        step = jax.device_put(jnp.int32(7), NamedSharding(mesh, WHOLE))
    else:
        placed, step = [jnp.asarray(a) for a in arrays], jnp.int32(7)
    trainable = dict(zip(("w1", "q"), placed, strict=True))
    return TrainState(trainable, {"mu": trainable["w1"]}, step)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Of four devices, each with the adapters of two experts."""
    folder = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(folder, 2, False)
    checkpoints.save(7, state(4, EXPERTS), Position(1, 3), None)
    checkpoints.close()
    return folder


@pytest.mark.parametrize(("count", "spec"), [(4, EXPERTS), (2, EXPERTS), (4, WHOLE), (1, EXPERTS), (None, None)], ids=str)
def test_on_another_mesh(count, spec, saved):
    checkpoints, now = Checkpoints(saved, 2, False), state(count, spec, seed=1)
    found, position = checkpoints.newest(now)
    checkpoints.close()
    assert position == Position(1, 3) and int(found.step) == 7
    for a, before, here in zip(jax.tree.leaves(found), jax.tree.leaves(state(None, None)), jax.tree.leaves(now), strict=True):
        np.testing.assert_array_equal(a, before)
        assert a.sharding == here.sharding


def test_what_a_disk_has_changed_is_found_on_a_mesh(saved, monkeypatch):
    """Sums are those of the whole array, wherever its parts lie."""
    checkpoints = Checkpoints(saved, 2, False)
    real = checkpoints.manager.restore

    def changed(*arguments, **more):
        restored = real(*arguments, **more)
        name = next(iter(restored.state))
        restored.state[name] = restored.state[name].at[1, 5, 2, 4].add(1) if restored.state[name].ndim == 4 else restored.state[name] + 1
        return restored

    monkeypatch.setattr(checkpoints.manager, "restore", changed)
    with pytest.raises(UserError, match="is damaged"):
        checkpoints.restore(state(2, EXPERTS), 7)
    checkpoints.close()
