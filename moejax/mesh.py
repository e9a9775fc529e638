"""Several devices: their mesh of one axis, and where on it every array of a run lies. What no device is needed for is a function of shapes.

Outside the models alone. Inside a program over the mesh a model's weights are what this device has of them: `moejax.models.ops.spread`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.config_mesh import MeshConfig
from moejax.errors import UserError
from moejax.models.layers import Frozen
from moejax.models.ops import host, tiles
from moejax.models.ops.quantized import is_quantized
from moejax.models.ops.spread import AXIS, RowsOf

Tree = Any
WHOLE = P()
ROWS = P(AXIS)


@dataclass(frozen=True)
class Devices:
    """A mesh and how weights and the optimizer's state lie on it, as `MeshConfig` has them.

    The methods give trees of `NamedSharding` of the form of the tree that they are given, abstract or not: for `jax.device_put`, for
    `jax.ShapeDtypeStruct`, for `out_shardings`. What lies in the host's memory stays in that of its device.
    """

    mesh: Mesh | AbstractMesh
    weights: str = "whole"
    moments: str = "whole"

    @property
    def count(self) -> int:
        return int(self.mesh.size)

    def whole_rows(self, rows: int) -> int:
        """The next number of rows that the devices divide."""
        return -(-rows // self.count) * self.count

    def of_weights(self, tree: Tree) -> Tree:
        """Of a model's state, trainable or frozen, or of a tree of the same variables (gradients).

        `experts`: stacks of experts' matrices (all their parts), biases and adapters [layers, experts, …] by expert. `spread`: codes and
        scales of frozen matrices, and frozen matrices of experts and linear layers that are not in 4 bits, by their rows […, out, in];
        scales of scales, embedding, head, router, norms and biases are whole. So is whatever the devices do not divide. On a TPU all parts
        of matrices in 4 bits, by the axis that leaves the least to fill up.
        """
        return self._of(tree, self._of_weight)

    def of_optimizer(self, tree: Tree) -> Tree:
        """Of an optimizer's state: as its weights, and where `moments` are spread by the longest axis that the devices divide."""
        return self._of(tree, self._of_moment)

    def of_rows(self, tree: Tree, axis: int = 0) -> Tree:
        """Of batches, whose rows are on this axis of every leaf."""
        return jax.tree.map(lambda _: NamedSharding(self.mesh, P(*(None,) * axis, AXIS)), tree)

    def whole(self, tree: Tree) -> Tree:
        """All of it on each device."""
        return self._of(tree, lambda *_: WHOLE)

    def over_rows(self, function: Callable[..., Any], places: tuple[Tree, ...], out: Tree, *operands: Any) -> Any:
        """function(*operands) on each device, of what `places` (as the other methods give them; None: all of it) say that it has.

        out: PartitionSpecs of what it returns. Inside, a model's frozen matrices of which a device has a part of the rows say so.
        """

        def local(*operands: Any) -> Any:
            return function(*(o if place is None else self._marked(o, place) for o, place in zip(operands, places, strict=True)))

        specs = tuple(WHOLE if place is None else jax.tree.map(lambda s: s.spec, place) for place in places)
        # check_vma: the experts' loops carry zeros that are the same everywhere and rows that are not, which it refuses.
        return jax.shard_map(local, mesh=self.mesh, in_specs=specs, out_specs=out, check_vma=False)(*operands)

    def _marked(self, tree: Tree, places: Tree) -> Tree:
        def mark(node: Any, place: Any) -> Any:
            value = node.get_value() if isinstance(node, Frozen) else None
            if not isinstance(value, jax.Array) or AXIS not in place.get_value().spec[value.ndim - 2 :]:
                return node
            return node.replace(RowsOf(value, value.shape[-2] * self.count))

        return jax.tree.map(mark, tree, places, is_leaf=_is_variable) if self.weights == "spread" else tree

    def _of(self, tree: Tree, rule: Any) -> Tree:
        found = []
        for path, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_variable)[0]:
            for leaf in jax.tree.leaves(node):
                kind = host.KIND if host.is_host(leaf) else None
                found.append(NamedSharding(self.mesh, rule(path, node, leaf), memory_kind=kind))
        return jax.tree.unflatten(jax.tree.structure(tree), found)

    def _of_weight(self, path: Any, variable: Any, leaf: Any) -> P:
        axes = variable.get_metadata("axes", ()) if _is_variable(variable) else ()
        if self.weights == "experts" and _of_experts(path, axes) and self._divides(leaf, 1):
            return P(None, AXIS)
        if self.weights == "spread" and isinstance(variable, Frozen) and _of_matrices(path, axes):
            row = 1 if len(axes) == 3 else 2  # behind layers, or layers and experts
            if leaf.ndim == row + 2 and (axis := self._dealt(variable.get_value(), leaf.shape)) is not None:
                return P(*(None,) * axis, AXIS)
        return WHOLE

    def _of_moment(self, path: Any, variable: Any, leaf: Any) -> P:
        as_weight = self._of_weight(path, variable, leaf)
        if self.moments == "whole" or as_weight != WHOLE:
            return as_weight
        axes = [axis for axis in range(leaf.ndim) if self._divides(leaf, axis)]
        axis = max(axes, key=lambda axis: leaf.shape[axis], default=None)
        return WHOLE if axis is None else P(*(None,) * axis, AXIS)

    def _dealt(self, value: Any, shape: tuple[int, ...]) -> int | None:
        """The axis of a matrix, or of its codes or scales, that each device has a part of."""
        if is_quantized(value) and value.layout == "columns":
            last = tiles.dealt(shape[-2], shape[-1], self.count)
            return None if last is None else len(shape) + last
        return len(shape) - 2 if shape[-2] > 0 and shape[-2] % self.count == 0 else None

    def _divides(self, leaf: Any, axis: int) -> bool:
        return leaf.ndim > axis and leaf.shape[axis] > 0 and leaf.shape[axis] % self.count == 0


def devices(config: MeshConfig, there: Sequence[Any] | None = None) -> Devices:
    """The mesh of a config, over the first of this machine's devices (of all processes'), or of those given: a topology's for a program
    that is compiled for machines that are not here. Raises UserError for more devices than there are, and for unlike ones."""
    there = jax.devices() if there is None else there
    count = len(there) if config.devices is None else config.devices
    if count > len(there):
        kinds = ", ".join(sorted({device.device_kind for device in there}))
        raise UserError(
            f"mesh.devices = {count}: expected at most {len(there)}, the number of devices here ({kinds}). To try it on a CPU: "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    chosen = list(there[:count])
    kinds_of = {device.device_kind: [d.id for d in chosen if d.device_kind == device.device_kind] for device in chosen}
    if len(kinds_of) > 1:
        each = "; ".join(f"{kind}: {', '.join(map(str, ids))}" for kind, ids in kinds_of.items())
        raise UserError(
            f"mesh: the devices are not of one kind ({each}): every one does the same work. Name those of one kind in CUDA_VISIBLE_DEVICES"
        )
    if idle := sorted({d.process_index for d in there} - {d.process_index for d in chosen}):
        raise UserError(
            f"mesh.devices = {count} of {len(there)} leaves processes without a device ({', '.join(map(str, idle))}): expected "
            "null (all), or fewer processes"
        )
    # Auto: with jax's own default, Explicit, a gather from a whole table is refused.
    return Devices(Mesh(np.array(chosen), (AXIS,), axis_types=(AxisType.Auto,)), config.weights, config.moments)


def abstract(config: MeshConfig, count: int) -> Devices:
    """The same of this many devices that are nowhere: for shapes, bytes and lowering."""
    return Devices(AbstractMesh((count,), (AXIS,), (AxisType.Auto,)), config.weights, config.moments)


def of_model(state: Tree) -> Devices | None:
    """The mesh that a model's state lies on, and how; None for one device."""
    arrays = [a for a in jax.tree.leaves(state) if isinstance(a, jax.Array)]
    found = next((a.sharding for a in arrays if isinstance(a.sharding, NamedSharding) and a.sharding.mesh.axis_names == (AXIS,)), None)
    if found is None:
        return None

    def fits(devices: Devices) -> bool:
        places = jax.tree.leaves(devices.of_weights(state))
        return all(a.sharding.is_equivalent_to(place, a.ndim) for a, place in zip(arrays, places, strict=True))

    ways = [Devices(found.mesh, weights) for weights in ("whole", "spread", "experts")]
    return next(filter(fits, ways), ways[0])


def device_bytes(tree: Tree, shardings: Tree) -> int:
    """What each device holds of a tree, abstract or not, without what lies in the host's memory."""
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(s.shard_shape(a.shape)) * a.dtype.itemsize for a, s in leaves if not host.is_host(a))


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _names(path: Any) -> set[str]:
    return {str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path}


def _of_experts(path: Any, axes: tuple[str, ...]) -> bool:
    """Whether it is of one expert each, [layers, experts, …]; a router has all of them."""
    return axes[:2] == ("layers", "experts") and "router" not in _names(path)


def _of_matrices(path: Any, axes: tuple[str, ...]) -> bool:
    """Whether it is the weight of a linear layer or of experts', [layers, (experts,) out, in], but for a router's: that is small."""
    return len(axes) >= 3 and {"weight"} <= _names(path) and not {"router", "conv", "lora"} & _names(path)
