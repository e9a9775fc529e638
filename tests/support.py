"""Where things lie, and how tensors are compared."""

from functools import reduce
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from moejax.training.state import split
from moejax.training.step import Objective, sums

ROOT = Path(__file__).parent.parent
VECTORS = ROOT / "tests" / "vectors"
SHARED = ROOT.parent / "shared"


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


def loss_and_gradients(model, batch, **settings):
    """Mean loss, routing statistics and all gradients (in a model's places) of the training objective."""
    graphdef, trainable, frozen = split(model, full=True)
    objective = Objective(graphdef, full=True, chunk_tokens=16, **settings)

    def mean(trainable):
        total, (_, stats) = sums(objective, trainable, frozen, batch, None)
        return total / batch.loss_mask.sum(), stats

    (loss, stats), gradients = jax.jit(jax.value_and_grad(mean, has_aux=True))(trainable)
    return loss, stats, nnx.merge(graphdef, gradients, frozen)
