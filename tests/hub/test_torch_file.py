"""Reading torch.save without torch (tests/oracles/blackmamba.py wrote the files)."""

import builtins
import os
import pickle
import struct
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import VECTORS

from models.build import build
from moejax.errors import UserError
from moejax.hub.torch_file import TorchFile
from moejax.hub.weights import load_weights, read_config


def test_tensors():
    numbers = np.arange(24, dtype=np.float32)
    expected = {
        "plain": numbers.reshape(4, 6),
        "transposed": numbers.reshape(4, 6).T,
        "shared": numbers[6:18].reshape(3, 4),
        "bf16": numbers.astype(jnp.bfloat16),
        "parameter": numbers[:2],
        "ids": np.arange(3),
    }
    with TorchFile(VECTORS / "tensors.bin") as file:
        assert set(file.keys()) == set(expected)
        for name, value in expected.items():
            np.testing.assert_array_equal(file.get_tensor(name), value)
        assert file.get_tensor("bf16").dtype == jnp.bfloat16


def test_what_is_no_tensor_is_refused_and_not_run(tmp_path):
    with pytest.raises(UserError, match=r"not_only_tensors.bin .*pathlib.*only tensors are read"):
        TorchFile(VECTORS / "not_only_tensors.bin")
    half = tmp_path / "half.bin"
    half.write_bytes((VECTORS / "tensors.bin").read_bytes()[:500])
    with pytest.raises(UserError, match=r"half.bin is no whole PyTorch checkpoint"):
        TorchFile(half)


BEYOND = ({"shape": (5, 6)}, {"strides": (600, 1)}, {"offset": 1}, {"strides": (-6, 1)}, {"shape": (9, 6), "strides": (0, 1)})


@pytest.mark.parametrize("change", BEYOND)
def test_a_tensor_that_reaches_beyond_its_data_is_refused(change):
    with TorchFile(VECTORS / "tensors.bin") as file:
        file._tensors["plain"] = file._tensors["plain"]._replace(**change)
        with pytest.raises(UserError, match=r"tensor 'plain' .* reaches beyond its 24 stored elements"):
            file.get_tensor("plain")


def test_a_folder_with_a_bin(blackmamba_folder, tmp_path):
    """The config beside a checkpoint that lacks this model's tensors: the message names the first one."""
    (tmp_path / "config.json").write_text((blackmamba_folder / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes((VECTORS / "tensors.bin").read_bytes())
    with pytest.raises(UserError, match=r"6 tensors have no place in a BlackMamba of 4 layers and 4 experts, first 'bf16'"):
        load_weights(build(read_config(tmp_path), dtype=jnp.float32), tmp_path, jax.random.key(0))


def torch_zip(path, pickled, compression=zipfile.ZIP_STORED, data=None):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        for key, content in (data or {}).items():
            file.writestr(f"archive/data/{key}", content)
    return path


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.how = function, arguments

    def __reduce__(self):
        return self.how


def named(module, name):
    return f"c{module}\n{name}\n".encode()


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


PWNED = "tests-must-not-find-me"
HOSTILE = {
    "os.system": (pickle.dumps(Calls(os.system, f"touch {PWNED}"), 2), r"holds a posix\.system"),
    "eval": (pickle.dumps(Calls(builtins.eval, f"open({PWNED!r}, 'w')"), 2), r"holds a __builtin__\.eval"),
    "protocol 4": (pickle.dumps({"w": Calls(builtins.exec, f"open({PWNED!r}, 'w')")}, 4), r"holds a builtins\.exec"),
    "nested": (pickle.dumps({"model": {"a": [Calls(os.mkdir, PWNED)]}}, 2), r"holds a posix\.mkdir"),
    "getattr chain": (pickle.dumps(Calls(getattr, Calls(__import__, "os"), "system"), 2), r"holds a __builtin__\.getattr"),
    "dotted name": (b"\x80\x04\x8c\x05torch\x8c\x0dstorage.os.rm\x93.", r"holds a torch\.storage\.os\.rm"),
    "name through the memo": (b"\x80\x04" + text("os") + b"q\x00" + text("system") + b"q\x010h\x00h\x01\x93.", "POP"),
    "memo without POP": (b"\x80\x04" + text("os") + b"q\x00" + text("system") + b"\x93.", r"holds a os\.system"),
    "torch itself": (b"\x80\x02" + named("torch", "load") + b".", r"holds a torch\.load"),
    "old instances": (b"(" + text("true") + b"ios\nsystem\n.", "INST"),
    "extension registry": (b"\x80\x02\x82\x01.", "EXT1"),
    "a memo of 64 GB": (b"\x80\x02}r\xff\xff\xff\xff.", "numbers an object 4294967295"),
    "attributes on what it may call": (
        b"\x80\x02" + named("torch._utils", "_rebuild_tensor_v2") + b"N}" + text("make") + b"Ks\x86b.".replace(b"Ks", b"K\x01s"),
        "no whole PyTorch checkpoint",
    ),
    "a call of a dtype": (b"\x80\x02" + named("torch", "FloatStorage") + text("1") + b"\x85R.", "not callable"),
    "a reference to a module": (b"\x80\x02" + text("module") + text("os") + text("x") + b"\x87Q.", "refers to a 'module'"),
    "no end": (b"\x80\x02}", "no whole PyTorch checkpoint"),
    "nothing": (b"", "no whole PyTorch checkpoint"),
    "a list": (pickle.dumps([1], 2), "expected a dictionary of tensors"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickles(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickled, message = HOSTILE[case]
    with pytest.raises(UserError, match=f"hostile.bin.*{message}"):
        TorchFile(torch_zip(tmp_path / "hostile.bin", pickled))
    assert [path.name for path in tmp_path.iterdir()] == ["hostile.bin"]


def test_bombs(tmp_path, monkeypatch):
    bomb = torch_zip(tmp_path / "bomb.bin", b"\0" * (65 << 20), zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 100_000
    with pytest.raises(UserError, match="would be 68157440 bytes"):
        TorchFile(bomb)
    with zipfile.ZipFile(VECTORS / "tensors.bin") as file:
        members = {name.split("/", 1)[1]: file.read(name) for name in file.namelist()}
    data = {name.removeprefix("data/"): b"\0" * len(content) for name, content in members.items() if name.startswith("data/")}
    packed = torch_zip(tmp_path / "packed.bin", members["data.pkl"], zipfile.ZIP_DEFLATED, data)
    with TorchFile(packed) as file, pytest.raises(UserError, match=r"tensor 'plain' .*is compressed"):
        file.get_tensor("plain")


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
def test_truncated(keep, tmp_path):
    whole = (VECTORS / "tensors.bin").read_bytes()
    (tmp_path / "half.bin").write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(UserError, match=r"half.bin is no whole PyTorch checkpoint"):
        TorchFile(tmp_path / "half.bin")
