"""Arrays filled piece by piece from the host, each piece put where it is to lie: on the device, in pinned host memory, or, over a mesh, on
the devices that have a part in it and on no other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from moejax.models.ops import host
from moejax.models.ops.spread import AXIS


class Buffer:
    """An array as it is filled, of the shape, dtype and place (`sharding`; None: the device) of a `jax.ShapeDtypeStruct`.

    Over a mesh, and with several processes, only what lies on this process's devices is held here.
    """

    def __init__(self, leaf: Any):
        self._leaf = leaf
        if leaf.sharding is None:
            self._parts = [_Part(None, (0,) * leaf.ndim, leaf.shape)]
            return
        places = leaf.sharding.addressable_devices_indices_map(leaf.shape).items()
        boxes = ((device, [s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True)]) for device, index in places)
        self._parts = [_Part(d, tuple(a for a, _ in box), tuple(b - a for a, b in box)) for d, box in boxes]
        if host.is_host(leaf):
            for part in self._parts:
                part.array, part.view = host.empty(part.shape, leaf.dtype, part.device)

    @property
    def whole(self) -> bool:
        """Whether it is one array of one device, without a sharding."""
        return self._leaf.sharding is None

    def own(self, axis: int) -> tuple[int, int]:
        """From where to where on an axis this process's devices have anything."""
        return min(part.start[axis] for part in self._parts), max(part.start[axis] + part.shape[axis] for part in self._parts)

    def device(self, at: tuple[int, ...]) -> Any:
        """The device that alone has what lies at an index of the leading axes; None where several have, or none of this process's."""
        end = tuple(i + 1 for i in at) + self._leaf.shape[len(at) :]
        owners = [part.device for part in self._parts if part.within((*at, *(0,) * (len(end) - len(at))), end) is not None]
        return owners[0] if len(owners) == 1 else None

    def put(self, value: Any, at: tuple[int, ...], start_of: tuple[int, int] | None = None) -> None:
        """`value` from an index of the leading axes on; all of the array where that is (). Axes that `value` lacks are of length 1.
        start_of: (another axis, where on it the value begins).

        Returns when `value` is not read any more: its memory may change, and no more is queued than memory holds.
        """
        value = value.reshape((1,) * (self._leaf.ndim - value.ndim) + tuple(value.shape) if at else self._leaf.shape)
        rest = [start_of[1] if start_of is not None and axis == start_of[0] else 0 for axis in range(len(at), value.ndim)]
        start = (*at, *rest)
        end = tuple(a + n for a, n in zip(start, value.shape, strict=True))
        for part in self._parts:
            box = part.within(start, end)
            if box is not None:
                part.put(_cut(value, start, box), tuple(a - own for (a, _), own in zip(box, part.start, strict=True)), self._leaf.dtype)
        jax.block_until_ready([part.array for part in self._parts if part.array is not None])

    def value(self) -> jax.Array:
        arrays = [part.array for part in self._parts]
        if self.whole:
            return arrays[0]
        return jax.make_array_from_single_device_arrays(self._leaf.shape, self._leaf.sharding, arrays)


def is_here(leaf: Any, at: tuple[int, ...]) -> bool:
    """Whether a device of this process is to have anything of what lies at an index of an abstract array's leading axes."""
    if leaf.sharding is None:
        return True
    places = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
    return any(all(i in range(*s.indices(n)) for i, s, n in zip(at, index, leaf.shape, strict=False)) for index in places)


def part_here(leaf: Any) -> tuple[int, int, int] | None:
    """(axis, begin, end) of what this process's devices have of an abstract array that lies on several processes', each with an equal part
    in their order; else None."""
    sharding = leaf.sharding
    if not isinstance(sharding, NamedSharding) or AXIS not in sharding.spec:
        return None
    order = [device.process_index for device in sharding.mesh.devices.flat]
    processes = list(dict.fromkeys(order))
    if len(processes) == 1 or order != [process for process in processes for _ in range(len(order) // len(processes))]:
        return None
    axis = sharding.spec.index(AXIS)
    size, own = leaf.shape[axis] // len(processes), processes.index(jax.process_index())
    return axis, own * size, (own + 1) * size


def moved(tree: Any, places: Any) -> Any:
    """A tree with its arrays at these places (`Sharding`s), a leaf at a time. Those that are there already are not copied; the others are
    copies, of which the program may give any away. With several processes all have the same arrays."""

    def put(array: Any, place: Any) -> Any:
        if isinstance(array, jax.Array) and array.sharding == place:
            return array
        buffer = Buffer(jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place))
        buffer.put(array, ())
        return buffer.value()

    return jax.tree.map(put, tree, places)


@dataclass
class _Part:
    """What one device holds: from `start` on, `shape` of the array. view: where pinned memory is written through."""

    device: Any
    start: tuple[int, ...]
    shape: tuple[int, ...]
    array: Any = None
    view: np.ndarray | None = None

    def within(self, start: tuple[int, ...], end: tuple[int, ...]) -> list[tuple[int, int]] | None:
        """The (begin, end) of each axis that this part has of a box; None where it has nothing."""
        own = zip(self.start, self.shape, strict=True)
        box = [(max(a, first), min(b, first + n)) for a, b, (first, n) in zip(start, end, own, strict=True)]
        return box if all(a < b for a, b in box) else None

    def put(self, value: Any, at: tuple[int, ...], dtype: Any) -> None:
        if self.view is not None:
            self.view[tuple(slice(a, a + n) for a, n in zip(at, value.shape, strict=True))] = np.asarray(value)
        elif tuple(value.shape) == self.shape:
            # A copy: on a CPU `value` may be a view of the file, or of memory that the next tensor is read into.
            self.array = jnp.array(value, dtype, copy=True, device=self.device)
        else:
            if self.array is None:
                self.array = jnp.zeros(self.shape, dtype, device=self.device)
            here = value if self.device is None else jax.device_put(value, self.device)
            self.array = _put(self.array, here, tuple(jnp.int32(i) for i in at))


def _cut(value: Any, start: tuple[int, ...], box: list[tuple[int, int]]) -> Any:
    cut = tuple(slice(a - first, b - first) for first, (a, b) in zip(start, box, strict=True))
    return value if all(s.start == 0 and s.stop == n for s, n in zip(cut, value.shape, strict=True)) else value[cut]


@partial(jax.jit, donate_argnums=0)
def _put(buffer: jax.Array, part: jax.Array, start: tuple[jax.Array, ...]) -> jax.Array:
    """`buffer` with `part` from `start` on; in place, because the buffer is given away."""
    return jax.lax.dynamic_update_slice(buffer, part, start)
