"""What checkpoints call a model's tensors. No jax here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

Names = Mapping[str, str | tuple[str, str]]
"""A checkpoint's name of a tensor -> the variable here (`moe.w1.weight`), or the two whose rows it holds one after the other."""


@dataclass(frozen=True)
class BlockNames:
    """A checkpoint's tensors of one block, paths here without the stack's name.

    `{0}` in a name is the number of the checkpoint's layer, `{1}` of the next one, where a block is two of its layers (`layers`); `{e}`
    of the expert. stacked: one tensor over all experts [E, out, in], as transformers 5 holds them; interleaved: where that is of two, they
    have its rows in turn; transposed: it is [E, in, out], and files have it alone; renamed: what it calls otherwise.
    """

    weights: Names
    experts: Names
    stacked: Names = dataclasses.field(default_factory=dict)
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    layers: int = 1
    interleaved: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class TensorNames:
    """A checkpoint's tensors: those before the blocks, of a block of each stack, and those behind. unread: of files that have them though
    the head is tied. beyond: how the names of those begin that a checkpoint may have and the model has no use for."""

    before: Names
    blocks: tuple[BlockNames, ...]
    after: Names
    unread: tuple[str, ...] = ("lm_head.weight",)
    beyond: tuple[str, ...] = ()
