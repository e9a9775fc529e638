"""Matrices whose rows lie on the devices of several processes: each process reads some of the matrices, and all exchange rows.

A matrix in 4 bits cannot be made of its rows apart (its scales have one mean), nor be hashed so: it is read whole, once, by one process.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache, reduce
from operator import xor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.hub.buffers import part_here
from moejax.models.ops.split import pieces_of

_AXIS = "process"


class Deal:
    """Of a variable's matrices number i is read by process i modulo `count`. leaves: abstract, each with `leading` axes before a matrix's;
    parts: `part_here` of each."""

    def __init__(self, leaves: Sequence[Any], leading: int, parts: Sequence[tuple[int, int, int] | None]):
        devices = next(leaf.sharding.mesh for leaf, part in zip(leaves, parts, strict=True) if part is not None).devices.flat
        firsts = list({device.process_index: device for device in reversed([*devices])}.values())[::-1]
        self.count, self.own = len(firsts), [device.process_index for device in firsts].index(jax.process_index())
        self._mesh = Mesh(np.array(firsts), (_AXIS,))
        self._shapes = [(leaf.shape[leading:], leaf.dtype) for leaf in leaves]
        self._starts = [None if part is None else (part[0], part[1]) for part in parts]
        self._axes = tuple(None if part is None else part[0] - leading for part in parts)

    def exchanged(self, own: Sequence[Any] | None) -> Iterator[list[tuple[jax.Array, tuple[int, int] | None]]]:
        """Of the matrix of each process in turn, by leaf: what of it is for this one's devices, and (axis of the stack, from where on);
        None: all of it. own: the leaves of this one's matrix; None: it has none. All call it as often."""
        sharding, device = NamedSharding(self._mesh, PartitionSpec(_AXIS)), self._mesh.devices.flat[self.own]
        leaves = [None] * len(self._shapes) if own is None else own
        given = []
        for leaf, (shape, dtype) in zip(leaves, self._shapes, strict=True):
            mine = np.zeros((1, *shape), dtype) if leaf is None else leaf.astype(dtype).reshape((1, *shape))
            arrays = [jax.device_put(mine, device)]
            given.append(jax.make_array_from_single_device_arrays((self.count, *shape), sharding, arrays))
        found = [array.addressable_data(0) for array in _exchange(self._mesh, self._axes)(given)]
        for number in range(self.count):
            yield [(array[number], start) for array, start in zip(found, self._starts, strict=True)]


def deal_of(value: Any, leading: int) -> Deal | None:
    """How processes share the reading of an abstract weight; None where no matrix lies on several of them, or memories are several."""
    (_, piece), *others = pieces_of(value)
    leaves = jax.tree.leaves(piece)
    parts = [part_here(leaf) for leaf in leaves]
    if others or not any(part is not None and part[0] >= leading for part in parts):
        return None
    return Deal(leaves, leading, parts)


def joint_crc32(first: int, second: int, nbytes: int) -> int:
    """The CRC-32 of two pieces one behind the other, by those of each; nbytes: of the second. (zlib has it as crc32_combine.)"""
    for bit, column in enumerate(_behind(nbytes)):
        if first >> bit & 1:
            second ^= column
    return second


@lru_cache
def _behind(nbytes: int) -> tuple[int, ...]:
    """What each bit of a CRC-32 becomes where so many bytes of zeros follow: a CRC is linear, and so are its powers."""

    def applied(columns: Sequence[int], value: int) -> int:
        return reduce(xor, (column for bit, column in enumerate(columns) if value >> bit & 1), 0)

    power = [zlib.crc32(b"\0", 1 << bit) ^ zlib.crc32(b"\0") for bit in range(32)]  # one byte
    found = [1 << bit for bit in range(32)]
    while nbytes:
        if nbytes & 1:
            found = [applied(power, column) for column in found]
        power, nbytes = [applied(power, column) for column in power], nbytes >> 1
    return tuple(found)


@lru_cache
def _exchange(mesh: Mesh, axes: tuple[int | None, ...]) -> Any:
    specs = [PartitionSpec() if axis is None else PartitionSpec(*(None,) * (axis + 1), _AXIS) for axis in axes]
    return jax.jit(lambda arrays: arrays, out_shardings=[NamedSharding(mesh, spec) for spec in specs])
