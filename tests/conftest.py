"""Shared fixtures: the PyTorch vectors, and the tiny Mixtral they were made with."""

import json
import os
from functools import reduce
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from models.config import from_hub_config

VECTORS = Path(__file__).parent / "vectors"
ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"


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


def hub_tensor(tree_model, place):
    """The array of a model (weights or gradients in its place) at a Hub tensor's place."""
    value = reduce(getattr, place.path, tree_model).weight.get_value()
    index = tuple(i for i in (place.layer, place.expert) if i is not None)
    return value[index] if index else value


def assert_close_to_largest(ours, reference, tolerance, what):
    """Every element within `tolerance` of the reference's largest magnitude."""
    ours, reference = np.asarray(ours), np.asarray(reference)
    largest = np.abs(reference).max()
    difference = np.abs(ours - reference).max()
    assert difference <= tolerance * max(largest, 1e-12), f"{what}: differs by {difference:.3g}, largest {largest:.3g}"
