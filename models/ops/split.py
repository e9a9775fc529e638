"""A stack of weights in several memories: the first layers' on the device, the others' in the host's.

Outside the models it is one weight: `whole` gives the shapes that it has in one piece, `pieces_of` what it is filled by.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax

from moejax.models.ops.quantized import abstract, is_quantized


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Split:
    """A weight [L, …] as pieces [n, …] along its first axis, each an array or a `QuantizedTensor` with a place of its own."""

    pieces: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(piece.shape[0] for piece in self.pieces), *self.pieces[0].shape[1:])


def pieces_of(value: Any) -> Iterator[tuple[int, Any]]:
    """(its first layer, piece) of a weight [L, …]; itself, from 0 on, where it is in one."""
    first = 0
    for piece in value.pieces if isinstance(value, Split) else (value,):
        yield first, piece
        first += piece.shape[0] if piece.shape else 0


def joined(pieces: Iterable[Any]) -> Any:
    """The weight of these pieces."""
    several = (*pieces,)
    return Split(several) if len(several) > 1 else several[0]


def whole(value: Any) -> Any:
    """The shapes and dtypes of a split weight in one piece; any other weight itself."""
    if not isinstance(value, Split):
        return value
    piece = value.pieces[0]
    return abstract(piece.kind, value.shape, piece.layout) if is_quantized(piece) else jax.ShapeDtypeStruct(value.shape, piece.dtype)
