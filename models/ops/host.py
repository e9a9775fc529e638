"""Weights in the host's pinned memory, and how they come to the device.

An array in pinned memory says so in its type, in a traced program too: anyone who uses a weight takes a slice of it and fetches that. On a
GPU the fetch is an asynchronous copy over the bus; on a CPU the two memories are one, and the program computes the same numbers.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

KIND = "pinned_host"
TILE = 8
"""Rows of a TPU's tile."""
ROW_BYTES = 1 << 18
"""The bus takes as long for this many bytes as a single row of a table waits for it: about 10 µs at 25 GB/s."""


def sharding(device: Any = None) -> NamedSharding:
    """Pinned memory next to a device (None: this process's first). Raises ValueError where that has none."""
    device = jax.local_devices()[0] if device is None else device
    kinds = sorted(memory.kind for memory in device.addressable_memories())
    if KIND not in kinds:
        raise ValueError(f"{device.device_kind} has no pinned host memory (its memories: {', '.join(kinds) or 'none are known'})")
    return NamedSharding(Mesh(np.array([device]), ("device",)), PartitionSpec(), memory_kind=KIND)


def is_host(array: Any) -> bool:
    """Whether an array, a traced one, or a `jax.ShapeDtypeStruct` lies in the host's memory."""
    if isinstance(array, jax.ShapeDtypeStruct):
        return getattr(array.sharding, "memory_kind", None) == KIND
    return bool(isinstance(array, jax.Array) and jax.typeof(array).memory_space == jax.memory.Space.Host)


def fetched(array: Any) -> Any:
    """The array on the device; itself, if it is there. Traced only."""
    return jax.device_put(array, jax.memory.Space.Device) if is_host(array) else array


def entry(array: Any, index: Any) -> Any:
    """array[index], of one or several leading axes, on the device."""
    if not is_host(array):
        return array[index]
    where = [jnp.asarray(i, jnp.int32) for i in (index if isinstance(index, tuple) else (index,))]
    return jax.lax.platform_dependent(array, where, tpu=_by_one_axis, default=_entry)


def _entry(array: jax.Array, where: list[jax.Array]) -> jax.Array:
    kept = array.shape[len(where) :]
    start = (*where, *(jnp.zeros((), jnp.int32) for _ in kept))
    piece = jax.lax.dynamic_slice(array, start, (*(1 for _ in where), *kept), allow_negative_indices=False)
    found: jax.Array = fetched(piece).reshape(kept)
    return found


def _by_one_axis(array: jax.Array, where: list[jax.Array]) -> jax.Array:
    """The same for a TPU, whose compiler fetches parts along one axis alone."""
    leading, one = array.shape[: len(where)], jnp.zeros((), jnp.int32)
    for size, i in zip(leading, where, strict=True):
        one = one * size + i
    return _entry(array.reshape(-1, *array.shape[len(where) :]), [one])


def rows(table: jax.Array, index: jax.Array) -> jax.Array:
    """table[index], rows of a [V, D] table for int32 [...]. From the host's memory row by row or, where that takes longer, as a whole; to a
    TPU, whose compiler does not fetch a part of a tile, by tiles, and as a whole where the last one is not full."""
    if not is_host(table) or index.size * ROW_BYTES > table.size * table.dtype.itemsize:
        return _of_whole(table, index)
    on_tpu = partial(_one_by_one, _row_of_tile) if table.shape[0] % TILE == 0 else _of_whole
    found: jax.Array = jax.lax.platform_dependent(table, index, tpu=on_tpu, default=partial(_one_by_one, entry))
    return found


def _of_whole(table: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take(fetched(table), index, axis=0)


def _one_by_one(row: Callable[[jax.Array, jax.Array], jax.Array], table: jax.Array, index: jax.Array) -> jax.Array:
    found = jax.lax.map(partial(row, table), index.reshape(-1))
    return found.reshape(*index.shape, table.shape[1])


def _row_of_tile(table: jax.Array, i: jax.Array) -> jax.Array:
    tile = fetched(jax.lax.dynamic_slice_in_dim(table, i // TILE * TILE, TILE, allow_negative_indices=False))
    return jax.lax.dynamic_index_in_dim(tile, i % TILE, keepdims=False)


def empty(shape: tuple[int, ...], dtype: Any, device: Any = None) -> tuple[jax.Array, np.ndarray]:
    """An array in the host's memory, next to a device, and a view through which it is filled before anybody reads it: nothing of it is ever
    elsewhere."""
    # Pages of zeros that were never touched take no memory: what is copied from is nothing.
    array = jax.block_until_ready(jax.device_put(np.zeros(shape, dtype), sharding(device)))
    memory = (ctypes.c_char * max(1, array.nbytes)).from_address(array.unsafe_buffer_pointer())
    return array, np.frombuffer(memory, np.uint8)[: array.nbytes].view(dtype).reshape(shape)


def put(array: Any) -> jax.Array:
    """An array in the host's memory, or a `jax.ShapeDtypeStruct` of one."""
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding())  # type: ignore[return-value]
    return jax.device_put(array, sharding())


def nbytes(tree: Any) -> int:
    """Of the leaves that lie in the host's memory."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree) if is_host(a))
