"""What each of two processes reads of a model whose experts lie on both: what its own devices hold, and the model is the same.
As a program it is one of the two. `make test-long`."""

import json
import os
import pickle
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from support import ended
from test_weights import CONFIG

from moejax import mesh, processes
from moejax.config_mesh import MeshConfig
from moejax.hub.buffers import part_here
from moejax.hub.dealing import deal_of, joint_crc32
from moejax.hub.model import laid_out
from moejax.hub.quantized_cache import Content
from moejax.hub.safetensors_file import Reader
from moejax.hub.save import save_weights
from moejax.hub.weights import load_weights
from moejax.models.build import build
from moejax.models.config import Quantization

STARTS = ("checkpoint", "writes the cache", "cache", "a damaged cache")


def abstract():
    return build(CONFIG, quantization=Quantization())


def leaves(model):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(model))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_weights(build(CONFIG, key=jax.random.key(0)), folder)
    return folder


@pytest.mark.long
@pytest.mark.parametrize("weights", ["experts", "spread"])
def test_a_process_reads_what_its_devices_hold(weights, folder, tmp_path):
    content = Content()
    expected = leaves(load_weights(abstract(), folder, jax.random.key(0), cache=tmp_path / "one", content=content))
    (tmp_path / "expected").write_bytes(pickle.dumps({name: np.asarray(leaf) for name, leaf in expected.items()}))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, str(folder), str(tmp_path), weights, str(port)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([*command, str(number)], env=environment, **pipes) for number in range(2)]
    found = []
    for code, out, error in ended(started):
        assert code == 0, error
        found.append(json.loads(out.splitlines()[-1]))
    checkpoint, cache = folder / "model.safetensors", next((tmp_path / "one").glob("*.safetensors"))  # as theirs, which a damage ends
    # Of the others' scales a row is no whole block; by rows all have a matrix's mean and scale, by experts their own.
    parts = {"experts": ("experts", "moe.w"), "spread": (("experts", "_proj"), ("codes", "w2.weight.absmax"))}[weights]
    whole = {"experts": ("router",), "spread": ("router", "nested_absmax")}[weights]
    sizes = {"checkpoint": _sizes(checkpoint, parts[0], whole), "cache": _sizes(cache, parts[1], whole)}
    for start, *each in zip(STARTS, *found, strict=True):
        whole, shared = sizes["cache" if start == "cache" else "checkpoint"]
        assert {value for _, value in each} == {content.value}
        if start == "a damaged cache":  # all make it anew
            continue
        first, second = (nbytes for nbytes, _ in each)
        assert second == whole - shared // 2, (start, each, whole, shared)
        assert first == (whole if start == "writes the cache" else second), (start, each, whole, shared)


def test_a_checksum_of_pieces_is_that_of_the_whole():
    data = np.random.default_rng(0).bytes(5000)
    for cut in (0, 1, 64, 2500, 5000):
        first, second = data[:cut], data[cut:]
        assert joint_crc32(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(data)


def test_matrices_of_one_process_are_not_dealt_out():
    model = abstract()
    laid_out(model, mesh.devices(MeshConfig(weights="spread", devices=2)))
    codes = model.layers.moe.w1.weight.get_value()
    assert "data" in codes.codes.sharding.spec and deal_of(codes, 2) is None and part_here(codes.codes) is None


def _sizes(path, of, whole):
    """(bytes of a file's tensors, of those of which each process has half)."""
    reader = Reader(path)
    sizes = {name: int(np.prod(reader.shape(name))) * reader.dtype(name).itemsize for name in reader.names()}
    of = (of,) if isinstance(of, str) else of
    halved = (name for name in sizes if any(part in name for part in of) and not any(part in name for part in whole))
    return sum(sizes.values()), sum(sizes[name] for name in halved)


def damage(path):
    """Of the last row of an expert's codes, which lies on the other process's devices."""
    reader = Reader(path)
    name = "layers.moe.w1.weight.codes"
    end = reader._start + reader._entries[name]["data_offsets"][1]
    with path.open("r+b") as file:
        file.seek(end - 1)
        byte = file.read(1)[0]
        file.seek(end - 1)
        file.write(bytes([byte ^ 1]))


def one_of_two(folder, place, weights, port, number):
    """[bytes that it reads, the weights' hash] of each start. The weights on its devices are compared with those of one process."""
    nbytes, real = [0], os.preadv

    def counted(*arguments):
        count = real(*arguments)
        nbytes[0] += count
        return count

    os.preadv = counted
    expected = pickle.loads((place / "expected").read_bytes())
    asked = MeshConfig(weights=weights, coordinator=f"127.0.0.1:{port}", processes=2, process_id=number)
    found = []
    with processes.together(asked, {"asked": "{}"}):
        devices = mesh.devices(asked)
        for start in STARTS:
            model, content, nbytes[0] = abstract(), Content(), 0
            laid_out(model, devices)
            load_weights(model, folder, jax.random.key(0), cache=None if start == "checkpoint" else place / "cache", content=content)
            found.append((nbytes[0], content.value))
            for name, leaf in leaves(model).items():
                for shard in leaf.addressable_shards:
                    np.testing.assert_array_equal(shard.data, expected[name][shard.index], err_msg=name)
            if start == "cache" and number == 0:
                damage(next((place / "cache").glob("*.safetensors")))
            processes.wait_for_all(start)
    print(json.dumps(found))


if __name__ == "__main__":
    one_of_two(*map(Path, sys.argv[1:3]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
