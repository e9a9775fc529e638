"""How many parameters a model has, by kind, and how they are stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from moejax.models.build import Model
from moejax.models.ops.quantized import storage


@dataclass
class Group:
    """Parameters of one kind: how many, how stored, how many bytes."""

    parameters: int = 0
    bytes: int = 0
    dtype: str = ""
    trainable: bool = False


def groups_of(model: Model) -> dict[str, Group]:
    """Group name -> counts; of weights or of their shapes alone."""
    groups: dict[str, Group] = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        group = groups.setdefault(model.config.kind_of(tuple(map(str, path))) + (" LoRA" if "lora" in path else ""), Group())
        value: Any = variable.get_value()
        leaves = jax.tree.leaves(value)
        group.parameters += math.prod(value.shape)
        group.bytes += sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
        group.dtype = storage(value)
        group.trainable = isinstance(variable, nnx.Param)
    return groups
