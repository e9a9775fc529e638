"""Between our parameters and the names of a checkpoint's tensors, which the architecture says (`moejax.models.config.specs`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

from moejax.models.config import Architecture
from moejax.models.config.specs import Stack
from moejax.models.config.tensor_names import BlockNames


class Place(NamedTuple):
    """Where a Hub tensor lives here: a path of modules, the layer and the expert (None: not stacked), the variable of the module.

    half: the first or second half of the tensor's rows (None: all of it).
    """

    path: tuple[str, ...]
    layer: int | None = None
    expert: int | None = None
    attr: str = "weight"
    half: int | None = None


class Part(NamedTuple):
    """What a tensor over all experts holds of one of them: the expert's own tensor, by its name. half: of the expert's rows (None: all);
    the first or second of each two, where they are interleaved."""

    name: str
    expert: int
    half: int | None
    interleaved: bool = False

    def rows(self, count: int) -> slice:
        """Of the expert's `count` rows."""
        if self.half is None:
            return slice(0, count)
        if self.interleaved:
            return slice(self.half, count, 2)
        return slice(self.half * count // 2, (self.half + 1) * count // 2)


def attribute(model: Any, path: tuple[str, ...]) -> Any:
    """The module at a path of attributes."""
    for name in path:
        model = getattr(model, name)
    return model


def index_of(place: Place) -> Any:
    """The index of one tensor in its stacked variable."""
    return tuple(i for i in (place.layer, place.expert) if i is not None) or ...


@lru_cache(maxsize=32)
def tensors(config: Architecture) -> Mapping[str, tuple[Place, ...]]:
    """Every tensor of a checkpoint and its places here (two where a tensor holds two of our matrices), in the Hub's order."""
    table = {name: _places(variable) for name, variable in config.names.before.items()}
    for block in blocks(config):
        table |= _tensors_of(block)
    return table | {name: _places(variable) for name, variable in config.names.after.items()}


def block_tensors(config: Architecture, block: int) -> dict[str, tuple[Place, ...]]:
    """Those of one of our layers, counted over all stacks; in the same order for each layer of a stack."""
    return _tensors_of(next(islice(blocks(config), block, None)))


def modules(config: Architecture) -> dict[str, Place]:
    """Every Hub module that is one of our weights (its tensor's name without `.weight`) and its place, in the Hub's order."""
    return {
        name.removesuffix(".weight"): places[0]
        for name, places in tensors(config).items()
        if name.endswith(".weight") and len(places) == 1 and places[0].attr == "weight"
    }


@lru_cache(maxsize=8)
def target_of(config: Architecture) -> Mapping[str, str]:
    """Every Hub module that can have an adapter -> the adapter's target, by our name."""
    of_path = {path: target for target, paths in config.targets.items() for path in paths}
    return {name: of_path[place.path] for name, place in modules(config).items() if place.path in of_path}


@lru_cache(maxsize=8)
def stacked(config: Architecture) -> Mapping[str, tuple[Part, ...]]:
    """Every tensor over all experts that transformers 5 makes of a layer's, and its parts, expert by expert."""
    table = {}
    for stack, names, _, numbers in blocks(config):
        own = {variable: name for name, variable in names.experts.items()}
        for name, variable in names.stacked.items():
            halves = [(variable, None)] if isinstance(variable, str) else [(v, half) for half, v in enumerate(variable)]
            table[name.format(*numbers)] = tuple(
                Part(own[v].format(*numbers, e=e), e, half, names.interleaved)
                for e in range(stack.block.feed_forward.experts)
                for v, half in halves
            )
    return table


@lru_cache(maxsize=8)
def whole_of(config: Architecture) -> Mapping[str, str]:
    """Of a family whose files hold tensors over all experts alone: an expert's own tensor -> the one that holds it. Empty of the others."""
    parts = stacked(config).items() if in_and_out(config) else ()
    return {part.name: name for name, of_name in parts for part in of_name}


def in_and_out(config: Architecture) -> bool:
    """Whether the family's files hold tensors over all experts alone, matrices as [experts, in, out]."""
    return any(block.transposed for block in config.names.blocks)


@lru_cache(maxsize=8)
def renamed(config: Architecture) -> Mapping[str, str]:
    """Names that transformers 5 gives to tensors, and the checkpoint's own, where they differ."""
    table: dict[str, str] = {}
    for _, names, _, numbers in blocks(config):
        own = {variable: name for name, variable in names.weights.items()}
        table |= {name.format(*numbers): own[variable].format(*numbers) for name, variable in names.renamed.items()}
    return {name: own_name for name, own_name in table.items() if name != own_name}


_Block = tuple[Stack, BlockNames, int, list[int]]
"""The stack that a block is in and its names, its number in the stack, and the numbers of its layers in the checkpoint."""


def blocks(config: Architecture) -> Iterator[_Block]:
    first = 0
    for stack, names in zip(config.stacks, config.names.blocks, strict=True):
        for at in range(stack.repeats):
            yield stack, names, at, [first + i for i in range(names.layers)]
            first += names.layers


def _tensors_of(block: _Block) -> dict[str, tuple[Place, ...]]:
    stack, names, at, numbers = block
    table = {name.format(*numbers): _places(variable, stack.name, at) for name, variable in names.weights.items()}
    for e in range(stack.block.feed_forward.experts):
        for name, variable in names.experts.items():
            table[name.format(*numbers, e=e)] = _places(variable, stack.name, at, e)
    return table


def _places(
    variable: str | tuple[str, ...], stack: str | None = None, layer: int | None = None, expert: int | None = None
) -> tuple[Place, ...]:
    several = (variable,) if isinstance(variable, str) else variable
    paths = [(*filter(None, (stack,)), *name.split(".")) for name in several]
    return tuple(Place(path[:-1], layer, expert, path[-1], half if len(several) > 1 else None) for half, path in enumerate(paths))
