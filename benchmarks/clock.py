"""Clocks of the benchmarks: calls that take turns, and the rates that this device reaches."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

Name = TypeVar("Name", bound=Hashable)


def in_turn(calls: Mapping[Name, Callable[[], Any]], repeat: int) -> dict[Name, list[float]]:
    """Seconds of each call, `repeat` times, all meeting the same noise. A round before that, in which they may compile, does not count."""
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    for turn in range(repeat + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name] += [time.perf_counter() - start] * bool(turn)
    return seconds


def matrix_rate(size: int, dtype: Any) -> float:
    """FLOP/s of a square matrix product: what "the device's measured matrix rate" means here."""
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: x @ x)
    return 2 * size**3 / min(in_turn({"": lambda: product(a)}, 5)[""])


def copy_rate(nbytes: int) -> float:
    """Bytes read and written per second by a plain elementwise pass."""
    x = jnp.ones(nbytes // 4, jnp.float32)
    plus = jax.jit(lambda v: v + 1)
    return 2 * x.nbytes / min(in_turn({"": lambda: plus(x)}, 5)[""])


def difference(found: Any, expected: Any) -> float:
    """Largest over all arrays, of each one's largest element."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(jnp.max(jnp.abs(a.astype(jnp.float32) - e.astype(jnp.float32))) / jnp.max(jnp.abs(e))) for a, e in pairs)
