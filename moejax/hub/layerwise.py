"""A checkpoint without its model in memory: each layer is read, run over the activations, and forgotten."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.hub import peft, stored, streaming, weights
from moejax.hub.names import attribute, block_tensors, blocks, index_of
from moejax.hub.quantized_cache import Content
from moejax.models.build import Model, build
from moejax.models.config import Architecture
from moejax.models.config.specs import Stack
from moejax.models.lora import LoRA


class Checkpoint(NamedTuple):
    """A folder in Hub layout, and how its weights are stored here: arguments of `moejax.models.build.build`. Each adapter over it is a
    model of its own; without any it is one. content: takes what the hash of the weights is made of, as they are read. opened: reads another
    layout of files, as `stored.open_tensors` does."""

    sizes: Architecture
    folder: Path
    adapters: Sequence[Path] = ()
    arguments: Mapping[str, Any] = {}
    content: Content | None = None
    opened: Callable[[Path, ExitStack, Architecture], dict[str, Any]] = stored.open_tensors


class Matrix(NamedTuple):
    """A weight as it is stored, under the checkpoint's own name, and for each adapter (A, B, scale) or None."""

    name: str
    value: Any
    pairs: list[tuple[Any, Any, float] | None]


class Routing(NamedTuple):
    """Of one layer. probabilities: fp32 [T, E]; ranked: the same with the router's bias, where it has one for the choice; own: int32
    [T, K], the experts that it chose or would have chosen."""

    probabilities: np.ndarray
    ranked: np.ndarray
    own: np.ndarray


class Walk:
    """A checkpoint's models over one row of tokens, from the embedding to the logits. Computed in fp32.

    In memory are one layer, the embedding or the head, and the adapters. Raises UserError as `weights.load_weights` and
    `peft.load_adapter` do.
    """

    def __init__(self, checkpoint: Checkpoint, tokens: np.ndarray, stack: ExitStack):
        """tokens: int32 [T]. What is opened is closed by `stack`."""
        self.sizes, self.folder, self._content = checkpoint.sizes, checkpoint.folder, checkpoint.content
        self._layer, self._stack, self._at = 0, self.sizes.stacks[0].name, 0  # which layer is in memory: of all, and of its stack
        self._window: int | None = None
        arguments = {**checkpoint.arguments, "dtype": jnp.float32}
        whole = build(self.sizes, **arguments)  # shapes and names; nothing of it is ever filled but adapters
        self._pairs: list[Any] = [_pairs(whole, adapter) for adapter in checkpoint.adapters] or [None]
        self.part = build(_one_of_each(self.sizes), **arguments)  # a layer of each stack; one alone is filled at a time
        self._blank = jax.tree.map(lambda shape: shape, nnx.state(self.part))  # variables of its own: those of the part are filled
        self._run = {stack.name: _runner(getattr(self.part, stack.name), len(tokens)) for stack in self.sizes.stacks}
        self._files = checkpoint.opened(self.folder, stack, self.sizes)
        weights.check_names(self._files, whole, self.folder)
        self._fill(self._files, "embed")
        row = jnp.asarray(tokens)[None]
        self.streams = [self._with_rows(pairs, "embed_rows").embedded(row) for pairs in self._pairs]

    @property
    def layers(self) -> int:
        return self.sizes.blocks

    def read(self, layer: int) -> None:
        """Put the weights of a layer in the place of what was there."""
        stack, _, self._at, _ = list(blocks(self.sizes))[layer]
        self._layer, self._stack = layer, stack.name
        self._window = None if stack.windows is None else stack.windows[self._at]
        nnx.update(self.part, self._blank)
        files = {name: self._files[own] for name, own in self._own_names().items() if own in self._files}
        self._fill(files, stack.name)

    def _fill(self, files: dict[str, Any], under: str) -> None:
        streaming.fill(self.part, files, self.folder, under=under, keep=None if self._content is None else self)

    def put(self, name: str, value: Any, index: tuple[int, ...]) -> None:
        """What `fill` read, under the place that it has in the whole model."""
        if self._content is not None:
            self._content.put(name, np.asarray(value), (self._at, *index[1:]) if index else ())

    def wait(self) -> None:
        """Until nothing that was put is read any more."""
        if self._content is not None:
            self._content.wait()

    def step(self, model: int, experts: np.ndarray | None = None) -> Routing | None:
        """Run a model's stream through the layer that was read, each token through `experts` (int32 [T, K]) or those that it chooses.

        None where nothing is chosen: in a dense model, or a layer without experts.
        """
        layer = getattr(self.part, self._stack)
        if self._pairs[model] is not None:
            nnx.update(layer, _one_layer(self._pairs[model][self._stack], self._at))
        # One program for both, so that equal weights give equal numbers.
        others = np.zeros((self.streams[model].shape[1], self.sizes.experts_per_token), np.int32) if experts is None else experts
        stream, seen = self._run[self._stack](nnx.split(layer)[1], self.streams[model], others, experts is None, self._window)
        self.streams[model] = jax.block_until_ready(stream)
        return Routing(*(np.asarray(a) for a in seen[0])) if seen else None

    def end(self) -> None:
        """Read what comes after the layers."""
        nnx.update(self.part, self._blank)
        for under in ("norm", "embed" if self.sizes.tie_word_embeddings else "head"):
            self._fill(self._files, under)

    def logits(self, model: int) -> np.ndarray:
        """fp32 [T, V], after `end`."""
        part = self._with_rows(self._pairs[model], "embed_rows" if self.sizes.tie_word_embeddings else "head_rows")
        return np.asarray(part.logits(part.norm(self.streams[model]))[0])

    def _with_rows(self, pairs: dict[str, nnx.State] | None, name: str) -> Model:
        """The part that is in memory, with the rows of tokens that a model trained."""
        if pairs is not None and name in pairs:
            nnx.update(getattr(self.part, name), pairs[name])
        return self.part

    def matrices(self) -> Iterator[Matrix]:
        """Every weight that is in memory now, one layer's and one expert's at a time."""
        own = self._own_names()
        for (path, attr), parts in streaming.by_variable(self.part).items():
            module = attribute(self.part, path)
            value = getattr(module, attr).get_value()
            if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(value)):
                continue
            lora = getattr(module, "lora", None) if attr == "weight" else None
            rows = getattr(self.part, f"{path[0]}_rows", None) if attr == "weight" else None
            for name, place in parts:
                index = () if place.layer is None else index_of(place)
                at = (self._at, *index[1:])
                pairs = [None if lora is None or p is None else (*_taken(_pair(p, path, lora), at), lora.scale) for p in self._pairs]
                if rows is not None:
                    trained_rows = [p and p[f"{path[0]}_rows"]["rows"].get_value() for p in self._pairs]
                    pairs = [None if r is None else _as_pair(rows.ids, r, value) for r in trained_rows]
                yield Matrix(own.get(name, name), _taken(value, index), pairs)

    def _own_names(self) -> dict[str, str]:
        """The names of a layer's tensors in a model that has one of each stack -> in the checkpoint."""
        number = [stack.name for stack in self.sizes.stacks].index(self._stack)
        return dict(zip(block_tensors(self.part.config, number), block_tensors(self.sizes, self._layer), strict=True))


def _one_of_each(sizes: Architecture) -> Architecture:
    """The same with a single block in every stack."""

    class OneOfEach(type(sizes)):  # type: ignore[misc]
        @property
        def stacks(self) -> tuple[Stack, ...]:
            return tuple(dataclasses.replace(stack, repeats=1) for stack in super().stacks)

    one: Architecture = OneOfEach(**{name: getattr(sizes, name) for name in sizes.fields()})
    return one


def _pairs(whole: Model, adapter: Path) -> dict[str, nnx.State]:
    """An adapter's A and B, stacked over all layers of each stack, and the rows of tokens that it trained."""
    peft.load_adapter(whole, adapter)
    # States of its own: `whole` may read another one.
    names = [stack.name for stack in whole.config.stacks] + [n for n in ("embed_rows", "head_rows") if getattr(whole, n) is not None]
    return {name: jax.tree.map(jnp.asarray, nnx.state(getattr(whole, name), nnx.LoRAParam)) for name in names}


def _as_pair(ids: tuple[int, ...], rows: jax.Array, table: jax.Array) -> tuple[jax.Array, jax.Array, float]:
    """Trained rows as what is added to their table: (A, B, scale)."""
    at = jnp.asarray(ids)
    return rows - table[at].astype(jnp.float32), (jnp.arange(table.shape[0])[:, None] == at).astype(jnp.float32), 1.0


def _pair(pairs: Any, path: tuple[str, ...], lora: LoRA) -> tuple[Any, Any]:
    """A and B of a module, stacked."""
    a, b = (reduce(getitem, (*where, "lora", name), pairs) for where, name in ((lora.owner(path), "a"), (path, "b")))
    return a.get_value(), b.get_value()


# Compiled once for all layers and experts: an index that is a number in the program would be a program each.


@jax.jit
def _taken(value: Any, index: tuple[Any, ...]) -> Any:
    """What lies at an index of the leading axes, in every leaf."""
    return jax.tree.map(lambda a: a[index], value)


@jax.jit
def _one_layer(pairs: Any, layer: Any) -> Any:
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, layer, 1), pairs)


def _runner(layers: nnx.Module, length: int) -> Callable[..., tuple[jax.Array, list[tuple[jax.Array, ...]]]]:
    """The compiled function of one layer: its weights, the stream [1, T, D] before it, the experts that tokens must visit, whether they
    visit their own instead, and how far the layer attends -> the stream after it, and what its router gave and would have chosen."""
    graphdef = nnx.split(layers)[0]
    segment_ids = jnp.ones((1, length), jnp.int32)
    positions = jnp.arange(length)[None]

    @jax.jit
    def run(state: nnx.State, x: jax.Array, experts: Any, free: Any, window: Any) -> tuple[jax.Array, list[tuple[jax.Array, ...]]]:
        layer: Any = nnx.merge(graphdef, jax.tree.map(lambda a: a[0], state))
        moe: Any = getattr(layer, "moe", None)
        seen: list[tuple[jax.Array, ...]] = []

        def chosen(probabilities: jax.Array) -> jax.Array:
            own = choose(probabilities)
            seen.append((probabilities, moe.ranked(probabilities), own))
            return jnp.where(free, own, experts)

        if moe is not None:
            choose = moe.choose
            object.__setattr__(moe, "choose", chosen)  # for this trace only
        x = layer.mixed(x, segment_ids, positions, None, "none", window)
        return layer.fed_forward(x, segment_ids > 0, None, False)[0], seen

    return run
