"""`--check-frozen`: that a run changed no byte of the weights that it does not train."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from moejax.errors import UserError
from moejax.models.ops import host
from moejax.training.checkpoint import checksums


class Frozen:
    """Sums of each array of a tree, taken where it lies; `check` takes them again.

    Arrays in the host's pinned memory come to the device an entry of the first axis at a time.
    """

    def __init__(self, tree: Any):
        self._before = _sums(tree)
        self.nbytes = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))

    def check(self, tree: Any) -> str:
        """What to report where nothing has changed. Raises UserError, with the first array, where something has."""
        now = _sums(tree)
        changed = sorted(name for name in self._before.keys() | now.keys() if self._before.get(name) != now.get(name))
        if changed:
            raise UserError(
                f"--check-frozen: {changed[0]} is not what it was before the first step ({len(changed)} of {len(now)} arrays). Frozen "
                "weights never change: failing memory, or a fault of moejax's; do not use what this run trained"
            )
        if not now:
            return "frozen weights: there are none (all are trained)"
        return f"frozen weights: {len(now)} arrays, {self.nbytes / 1e9:.2f} GB, bit-identical to before the first step"


def _sums(tree: Any) -> dict[str, list[list[int]]]:
    arrays = {jax.tree_util.keystr(path): array for path, array in jax.tree_util.tree_leaves_with_path(tree)}
    there = {name: array for name, array in arrays.items() if not host.is_host(array)}
    found = {name: [sums] for name, sums in checksums(there).items()}
    for name in arrays.keys() - there.keys():
        array = arrays[name]
        found[name] = [checksums({name: _entry(array, jnp.int32(i))})[name] for i in range(array.shape[0])]
    return found


_entry = jax.jit(host.entry)
