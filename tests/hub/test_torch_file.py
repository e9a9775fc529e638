"""Reading torch.save without torch (tests/oracles/blackmamba.py wrote the files)."""

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


@pytest.mark.parametrize("change", [{"shape": (5, 6)}, {"strides": (600, 1)}, {"offset": 1}, {"strides": (-6, 1)}])
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
