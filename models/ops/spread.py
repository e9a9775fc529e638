"""What the models know of several devices: the name of the axis that rows are spread over, and weights of which each device has a part.

All of it is of the inside of `jax.shard_map`. There every device runs the same program, and has to come to the same collectives: none may
stand under a condition, or in a loop, that its own rows decide.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax

AXIS = "data"
"""Of the mesh. Each device has its part of a batch's rows, and of what else is spread over the same axis."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowsOf:
    """A frozen matrix [..., out, in] of which this device has a part of the rows. (Of one in 4 bits its codes say so themselves.)"""

    part: jax.Array
    out: int = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.part.shape[:-2], self.out, self.part.shape[-1])

    @property
    def dtype(self) -> Any:
        return self.part.dtype

    def gathered(self) -> jax.Array:
        return all_rows(self.part, self.part.ndim - 2)


def all_rows(part: jax.Array, axis: int = 0) -> jax.Array:
    """The parts of all devices, one behind the other on an axis. Backwards each gets the sum of what all have for its part."""
    gathered: jax.Array = jax.lax.all_gather(part, AXIS, axis=axis, tiled=True)
    return gathered


def own_rows(sums: jax.Array) -> jax.Array:
    """Of what all devices have for all rows, the sum for this device's rows."""
    scattered: jax.Array = jax.lax.psum_scatter(sums, AXIS, tiled=True)
    return scattered
