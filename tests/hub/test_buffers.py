"""Arrays filled piece by piece, over a mesh: each device has its part, and nothing else was ever put there."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.hub.buffers import Buffer
from moejax.models.ops import host

SHAPE = (2, 4, 6, 3)


def leaf(spec, kind=None, count=2):
    mesh = Mesh(np.array(jax.devices()[:count]), ("data",), axis_types=(AxisType.Auto,))
    return jax.ShapeDtypeStruct(SHAPE, np.float32, sharding=None if spec is None else NamedSharding(mesh, spec, memory_kind=kind))


@pytest.mark.parametrize(
    ("spec", "kind"),
    [(None, None), *((spec, kind) for spec in (P(), P(None, "data"), P(None, None, "data")) for kind in (None, host.KIND))],
)
def test_a_matrix_at_a_time(spec, kind):
    array, buffer = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE), Buffer(leaf(spec, kind))
    lent = np.empty(SHAPE[2:], np.float32)  # one piece of memory for all
    for index in np.ndindex(SHAPE[:2]):
        lent[...] = array[index]
        buffer.put(lent, index)
    lent[...] = -1
    value = buffer.value()
    np.testing.assert_array_equal(value, array)
    assert spec is None or (value.sharding.spec == spec and value.sharding.memory_kind == (kind or "device"))
    for shard in value.addressable_shards:
        np.testing.assert_array_equal(shard.data, array[shard.index])


@pytest.mark.parametrize(("at", "cut"), [((), np.s_[:]), ((1,), np.s_[1:2]), ((0, 2), np.s_[0:1, 2:4])], ids=str)
def test_larger_pieces(at, cut):
    array, buffer = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE), Buffer(leaf(P(None, "data")))
    given = array[cut].copy()
    buffer.put(given, at)
    given[...] = -1
    expected = np.zeros_like(array)
    expected[cut] = array[cut]
    filled = [part.array for part in buffer._parts]
    for device, part in enumerate(filled):
        of_device = expected[:, 2 * device : 2 * device + 2]
        assert part is None if not of_device.any() else np.array_equal(part, of_device)  # what another device has is not sent


def test_who_has_a_matrix():
    owners = [Buffer(leaf(P(None, "data"))).device((1, expert)) for expert in range(4)]
    assert owners == [jax.devices()[i] for i in (0, 0, 1, 1)]
    assert Buffer(leaf(P())).device((1, 0)) is None and Buffer(leaf(P(None, None, "data"))).device((1, 0)) is None
