"""Where things lie, and how tensors are compared."""

from functools import reduce
from pathlib import Path

import numpy as np

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
