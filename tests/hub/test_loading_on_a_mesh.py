"""A checkpoint, or its cache, into the parts of a mesh: the same weights as on one device, and on no device more than its share."""

from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx
from test_weights import CONFIG, arrays

from moejax import mesh
from moejax.config_mesh import MeshConfig
from moejax.hub import quantized_cache
from moejax.hub.buffers import Buffer, moved
from moejax.hub.model import laid_out
from moejax.hub.save import save_weights
from moejax.hub.weights import load_weights
from moejax.models.build import build
from moejax.models.config import LoRAConfig, Quantization
from moejax.models.layers import Placement
from moejax.models.ops import host

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    save_weights(build(CONFIG, key=KEY), folder)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def load(folder, weights=None, **more):
    placement = more.pop("placement", Placement())
    model = build(CONFIG, quantization=Quantization(), adapter=LoRAConfig(2, 4.0, 0.0, None), placement=placement)
    devices = None if weights is None else mesh.devices(MeshConfig(devices=2, weights=weights))
    if devices is not None:
        laid_out(model, devices)
    return load_weights(model, folder, KEY, **more), devices


@pytest.fixture(scope="module")
def expected(folder, cache):
    return arrays(load(folder, cache=cache)[0])


def on_devices(known):
    """Bytes on each device, of buffers that are not known (several arrays may be of one)."""
    shards = [shard for array in jax.live_arrays() if not host.is_host(array) for shard in array.addressable_shards]
    found = {(shard.device, shard.data.unsafe_buffer_pointer()): shard.data.nbytes for shard in shards}
    new = [(device, nbytes) for (device, pointer), nbytes in found.items() if pointer not in known]
    return {device: sum(nbytes for on, nbytes in new if on == device) for device in {device for device, _ in new}}


def buffers():
    shards = [shard for array in jax.live_arrays() for shard in array.addressable_shards]
    return {shard.data.unsafe_buffer_pointer() for shard in shards}


@pytest.mark.parametrize("from_cache", [False, True], ids=["checkpoint", "cache"])
@pytest.mark.parametrize("weights", [*(pytest.param(name, marks=pytest.mark.long) for name in ("whole", "spread")), "experts"])
def test_each_device_has_its_share(weights, from_cache, folder, cache, expected, monkeypatch):
    known, most, put = buffers(), {}, Buffer.put

    def watched(*arguments):
        put(*arguments)
        most.update({device: max(most.get(device, 0), there) for device, there in on_devices(known).items()})

    monkeypatch.setattr(quantized_cache, "_PIECE_BYTES", 512)  # smaller than a layer
    monkeypatch.setattr(Buffer, "put", watched)
    model, devices = load(folder, weights, **({"cache": cache} if from_cache else {}))
    found, state = arrays(model), nnx.state(model, nnx.Not(nnx.LoRAParam))
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    places = devices.of_weights(state)
    assert all(a.sharding == place for a, place in zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True))
    share, largest = mesh.device_bytes(state, places), max(np.prod(v.shape) * 4 for v in jax.tree.leaves(state) if v.ndim == 2)
    assert set(most) == set(jax.devices()[:2])
    for device, there in most.items():
        assert share // 2 < there <= share + 2 * largest, f"{device}: {there} of {share}"


@pytest.mark.long
@pytest.mark.parametrize("weights", ["whole", "experts"])
def test_experts_in_the_memory_of_their_devices_host(weights, folder, cache, expected):
    for more in ({}, {"cache": cache}):
        model, _ = load(folder, weights, placement=Placement(experts="host"), **more)
        for name, array in arrays(model).items():
            np.testing.assert_array_equal(array, expected[name], err_msg=name)
        assert host.is_host(model.layers.moe.w1.weight.get_value().codes)


def test_what_is_new_moves_to_its_place(folder):
    model, devices = load(folder, "experts")
    adapter = nnx.state(model, nnx.LoRAParam)
    places = devices.of_weights(adapter)
    there = moved(adapter, places)
    assert moved(there, places)["layers"]["moe"]["w1"]["lora"]["a"].get_value() is there["layers"]["moe"]["w1"]["lora"]["a"].get_value()
    given_away = jax.jit(partial(jax.tree.map, lambda a: a + 1), donate_argnums=0)(there)
    for before, after in zip(jax.tree.leaves(adapter), jax.tree.leaves(given_away), strict=True):
        np.testing.assert_array_equal(before + 1, after)  # the source is still there
