"""Reading torch.save without torch (tests/oracles/blackmamba.py wrote the files)."""

import contextlib
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import VECTORS

from moejax.errors import UserError
from moejax.hub.torch_file import TorchFile
from moejax.hub.weights import load_weights, read_config
from moejax.models.build import build


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
        assert set(file.names()) == set(expected)
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


@pytest.mark.parametrize("change", [{"shape": (5, 6)}, {"strides": (600, 1)}, {"offset": 1}, {"strides": (-6, 1)}])
def test_a_tensor_that_reaches_beyond_its_data_is_refused(change):
    with TorchFile(VECTORS / "tensors.bin") as file:
        file._tensors["plain"] = file._tensors["plain"]._replace(**change)
        with pytest.raises(UserError, match=r"tensor 'plain' .* reaches beyond its 24 stored elements"):
            file.get_tensor("plain")


def test_a_folder_with_a_bin(blackmamba_folder, tmp_path):
    """The config next to a checkpoint that lacks this model's tensors: the message names the first one."""
    (tmp_path / "config.json").write_text((blackmamba_folder / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes((VECTORS / "tensors.bin").read_bytes())
    with pytest.raises(UserError, match=r"6 tensors have no place in a BlackMamba of 4 layers and 4 experts, first 'bf16'"):
        load_weights(build(read_config(tmp_path), dtype=jnp.float32), tmp_path, jax.random.key(0))


# Hostile files. A pickle is written by hand, instruction by instruction: what Python's own pickler would never write.

STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQ"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00K\x02K\x03\x86K\x03K\x01\x86\x89ccollections\nOrderedDict\n)RtR"


def named(value):
    """A pickle of {"w": value}."""
    return b"\x80\x02}X\x01\x00\x00\x00w" + value + b"s."


def checkpoint(folder, pickled, compress=False, **more):
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/data/0", np.arange(6, dtype=np.float32).tobytes())
        for name, content in more.items():
            file.writestr(f"archive/{name}", content)
    return path


@pytest.mark.parametrize(
    "pickled",
    [
        named(TENSOR),
        b"\x80\x02}X\x05\x00\x00\x00model" + named(TENSOR)[2:-1] + b"s.",  # under "model"
        # A state_dict: an OrderedDict whose _metadata is set by BUILD.
        b"\x80\x02ccollections\nOrderedDict\n)RX\x01\x00\x00\x00w" + TENSOR + b"s}X\x09\x00\x00\x00_metadata}sb.",
        # Protocol 4: names from the stack.
        named(b"\x8c\x0ctorch._utils\x94\x8c\x12_rebuild_parameter\x94\x93(" + TENSOR + b"\x88NtR"),
    ],
)
def test_the_forms_that_torch_writes(pickled, tmp_path):
    with TorchFile(checkpoint(tmp_path, pickled)) as file:
        np.testing.assert_array_equal(file.get_tensor("w"), np.arange(6).reshape(2, 3))


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (named(b"cos\nsystem\nX\x04\x00\x00\x00true\x85R"), r"it holds a os\.system, and only tensors are read"),
        (named(b"cbuiltins\neval\nX\x01\x00\x00\x001\x85R"), r"it holds a builtins\.eval"),
        (named(b"\x8c\x02os\x8c\x06system\x93)R"), r"it holds a os\.system"),
        (named(b"(X\x01\x00\x00\x001ios\nsystem\n"), r"it holds a os\.system"),
        (named(b"ctorch\nload\n)R"), r"it holds a torch\.load"),
        (named(b"ctorch.serialization\nFloatStorage\n"), r"it holds a torch\.serialization\.FloatStorage"),
        # A dotted name that leads from an allowed module elsewhere, and a name that is no string.
        (named(b"\x8c\x0bcollections\x8c\x1aOrderedDict.__subclasses__\x93)R"), r"it holds a collections\.OrderedDict\.__subclasses__"),
        (named(b"K\x01K\x02\x93"), r"names a global by something other than two strings"),
        # Allowed names, used for something else: called with bad arguments, built upon, instantiated, called on a storage.
        (named(b"ctorch._utils\n_rebuild_tensor_v2\n)R"), r"a tensor is rebuilt from other things"),
        (named(b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00K\x02K\x03tR"), r"a tensor is rebuilt from other things"),
        (named(b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00K\x02\x85)tR"), r"a tensor is rebuilt from other things"),
        (named(b"ctorch._utils\n_rebuild_parameter\nK\x01\x85R"), r"a parameter is rebuilt from a int"),
        (named(b"ccollections\nOrderedDict\n]\x85R"), r"an OrderedDict is made with arguments"),
        (named(b"ctorch._utils\n_rebuild_tensor_v2\n}X\x0c\x00\x00\x00__defaults__Nsb"), r"sets the state of a _Global"),
        (named(TENSOR + b"}X\x06\x00\x00\x00offsetK\x09sb"), r"sets the state of a _Tensor"),
        (named(b"ccollections\nOrderedDict\n)\x81"), r"uses the instruction NEWOBJ"),
        (named(b"ctorch\nFloatStorage\nK\x01\x85R"), r"calls something that rebuilds no tensor"),
        (named(b"ccollections\nOrderedDict\nNR"), r"calls something that rebuilds no tensor"),
        (named(b"X\x01\x00\x00\x00aQ"), r"named by something other than a storage type and a key"),
        (named(b"\x82\x01"), r"uses the instruction EXT1"),
        (named(b"Pabc\n"), r"uses the instruction PERSID"),
        # Memory: a memo slot of 2^31 (the C unpickler fills all those before it), a string longer than the file, no such slot.
        (named(b"Nr\xff\xff\xff\x7f"), r"'w' is a NoneType"),
        (named(b"\x8d" + b"\xff" * 7 + b"\x00"), r"no whole PyTorch checkpoint"),
        (named(b"h\x09"), r"no whole PyTorch checkpoint"),
        # Nesting: 200,000 tuples in each other, as a value and as a key.
        (named(b")" + b"\x85" * 200_000), r"'w' is a tuple"),
        (b"\x80\x02})" + b"\x85" * 200_000 + b"Ns.", r"fills something other than a dictionary with names"),
        # The model inside itself.
        (b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s.", r"'model' is a dict: expected a dictionary of tensors"),
        # Stack and marks that do not fit, and no end.
        (b"\x80\x02R.", "takes more than it has put"),
        (b"\x80\x02t.", "lacks a mark"),
        (b"\x80\x02}K\x01a.", "appends to a dict"),
        (b"\x80\x02]K\x01K\x02s.", "fills something other than a dictionary"),
        (b"\x80\x02}", "no whole PyTorch checkpoint"),
        (b"", "no whole PyTorch checkpoint"),
        (b"\x80\x02].", "expected a dictionary of tensors"),
        (b"\x80\x02}K\x01" + TENSOR + b"s.", "1 is a _Tensor: expected"),
    ],
)  # fmt: skip
def test_a_hostile_pickle_is_refused(pickled, message, tmp_path):
    with pytest.raises(UserError, match=message):
        TorchFile(checkpoint(tmp_path, pickled))


def test_every_cut_of_a_pickle_is_refused(tmp_path):
    """Cut after any byte, or with any byte changed: one message, or tensors that are checked when they are read."""
    whole = named(TENSOR)
    for length in range(len(whole)):
        with pytest.raises(UserError):
            TorchFile(checkpoint(tmp_path, whole[:length]))
    for place in range(len(whole)):
        for value in (0, whole[place] ^ 1, 255):
            path = checkpoint(tmp_path, whole[:place] + bytes([value]) + whole[place + 1 :])
            with contextlib.suppress(UserError), TorchFile(path) as file:
                names = file.names()
                for name in names:
                    file.get_tensor(name)


def test_a_hostile_zip(tmp_path):
    for arguments, message in (
        ({"compress": True}, r"data\.pkl in it is compressed"),
        ({"byteorder": b"big"}, "not little-endian"),
    ):
        with pytest.raises(UserError, match=message):
            TorchFile(checkpoint(tmp_path, named(TENSOR), **arguments))
    path = checkpoint(tmp_path, named(TENSOR))
    whole = path.read_bytes()
    numbers = np.arange(6, dtype=np.float32).tobytes()
    path.write_bytes(whole.replace(numbers, numbers[::-1]))  # its checksum is no longer true
    with TorchFile(path) as file, pytest.raises(UserError, match=r"data of tensor 'w' cannot be read \(Bad CRC"):
        file.get_tensor("w")
    path.write_bytes(whole[:-30])
    with pytest.raises(UserError, match="no whole PyTorch checkpoint"):
        TorchFile(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", named(TENSOR))
    with TorchFile(path) as file, pytest.raises(UserError, match=r"data of tensor 'w' cannot be read"):
        file.get_tensor("w")
    with pytest.raises(UserError, match="no whole PyTorch checkpoint"):
        TorchFile(tmp_path / "nowhere.bin")


def test_a_tensor_larger_than_its_data_is_not_made(tmp_path):
    """Stride 0: 10^12 elements of one stored number."""
    million = b"J\x40\x42\x0f\x00"
    pickled = TENSOR.replace(b"K\x02K\x03\x86K\x03K\x01\x86", million * 2 + b"\x86K\x00K\x00\x86")
    with TorchFile(checkpoint(tmp_path, named(pickled))) as file, pytest.raises(UserError, match="reaches beyond its 6 stored"):
        file.get_tensor("w")
