"""Shared fixtures: the PyTorch vectors, and the tiny Mixtral they were made with."""

import json
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_COMPILATION_CACHE_DIR"] = ""  # nothing of a test's is left in the user's cache, or comes from there

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from support import VECTORS

from models.config import BlackMambaConfig, from_hub_config


@pytest.fixture(scope="session")
def mixtral_vectors():
    with np.load(VECTORS / "mixtral.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="session")
def mixtral_folder(mixtral_vectors, tmp_path_factory):
    """The reference's weights as a folder in Hub layout."""
    folder = tmp_path_factory.mktemp("mixtral")
    tensors = {name[2:]: np.ascontiguousarray(value) for name, value in mixtral_vectors.items() if name.startswith("w/")}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config = json.loads(str(mixtral_vectors["config"])) | {"model_type": "mixtral"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def reference_config(mixtral_folder):
    return from_hub_config(json.loads((mixtral_folder / "config.json").read_text()))


@pytest.fixture(scope="session")
def reference_batch(mixtral_vectors):
    """The right-padded, prompt-masked batch in our form."""
    from moejax.data.batch import Batch

    ids, mask, labels = (mixtral_vectors[k] for k in ("ids", "mask", "labels"))
    targets = np.zeros_like(ids)
    targets[:, :-1] = ids[:, 1:]
    loss_mask = np.zeros(ids.shape, np.float32)
    loss_mask[:, :-1] = labels[:, 1:] != -100
    positions = np.arange(ids.shape[1])[None] * mask
    return Batch(
        *(jnp.asarray(a, jnp.float32 if a is loss_mask else jnp.int32) for a in (ids, targets, loss_mask, mask, positions))
    )


@pytest.fixture(scope="session")
def blackmamba_vectors():
    return dict(np.load(VECTORS / "blackmamba.npz"))


@pytest.fixture(scope="session")
def blackmamba_folder(blackmamba_vectors, tmp_path_factory):
    """The oracle's weights as a folder in Hub layout."""
    folder = tmp_path_factory.mktemp("blackmamba")
    tensors = {name[2:]: np.ascontiguousarray(value) for name, value in blackmamba_vectors.items() if name.startswith("w/")}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    sizes = json.loads(str(blackmamba_vectors["config"]))
    sizes.pop("dt_rank")
    config = BlackMambaConfig(**sizes).to_hub_config()
    (folder / "config.json").write_text(json.dumps(config))
    return folder
