"""How many parameters a model has, by kind, and how they are stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from moejax.models.build import Model
from moejax.models.config import Architecture
from moejax.models.ops.nf4 import NF4Tensor

_GROUPS = (
    ("embeddings", "embed."), ("head", "head."), ("router", ".moe.router."), ("experts", ".moe.w"), ("attention", ".attention."),
    ("mamba", ".mamba."),
    ("norms", "norm"),
)  # fmt: skip


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
        name = ".".join(str(p) for p in path)
        lora = ".lora." in name
        group = groups.setdefault(_group_name(name) + (" LoRA" if lora else ""), Group())
        value: Any = variable.get_value()
        leaves = jax.tree.leaves(value)
        group.parameters += value.size if isinstance(value, NF4Tensor) else math.prod(value.shape)
        # Every stored leaf has whole bytes: NF4 codes are packed in pairs into uint8.
        group.bytes += sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
        group.dtype = _nf4_name(value) if isinstance(value, NF4Tensor) else str(value.dtype)
        group.trainable = isinstance(variable, nnx.Param)
    return groups


def base_and_active(groups: dict[str, Group], config: Architecture) -> tuple[int, int]:
    """Parameters without adapters: all, and those that one token meets."""
    base = sum(g.parameters for n, g in groups.items() if not n.endswith("LoRA"))
    idle = groups["experts"].parameters * (config.num_experts - config.experts_per_token) // config.num_experts
    return base, base - idle


def _group_name(path: str) -> str:
    dotted = f".{path}"
    return next(name for name, part in _GROUPS if part in dotted)


def _nf4_name(value: NF4Tensor) -> str:
    return "NF4" if value.offset is None else "NF4, double"
