"""Logits of a checkpoint without its model in memory: each layer is read, run over the activations, and forgotten."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.build import Model, build
from models.config import Architecture, MixtralConfig
from models.mixtral import Mixtral
from moejax.hub import peft, stored, streaming, weights

_LAYER = re.compile(r"^(model\.layers|decoder\.layers)\.(\d+)\.")


def logits(
    sizes: Architecture,
    folder: Path,
    tokens: np.ndarray,
    *,
    adapters: Sequence[Path] = (),
    advance: Callable[[], None] = lambda: None,
    **arguments: Any,
) -> list[np.ndarray]:
    """fp32 [T, V] of `tokens` (int32 [T]) by the checkpoint in `folder`, once for each adapter (or once, without any), computed in fp32.

    arguments: `models.build.build`'s, which say how the weights are stored. In memory are one layer, the embedding or the head, and the
    adapters. advance: called after each layer. Raises UserError as `weights.load_weights` and `peft.load_adapter` do.
    """
    arguments |= {"dtype": jnp.float32}
    whole = build(sizes, **arguments)  # shapes and names; nothing of it is ever filled but adapters
    pairs: list[Any] = [_pairs(whole, adapter) for adapter in adapters] or [None]
    part = build(sizes.replace(num_layers=layers_in(sizes)), **arguments)
    blank = nnx.split(part)[1]
    run = _runner(part, len(tokens))
    with ExitStack() as stack:
        files = stored.open_tensors(folder, stack)
        weights.check_names(files, whole, folder)
        streaming.fill(part, files, folder, under="embed")
        streams = [part.embed(jnp.asarray(tokens)[None], jnp.float32)] * len(pairs)
        for layer in range(sizes.num_layers // layers_in(sizes)):
            nnx.update(part, blank)
            streaming.fill(part, _of_layer(files, layer, layers_in(sizes)), folder, under="layers")
            for i, pair in enumerate(pairs):
                if pair is not None:
                    nnx.update(part.layers, jax.tree.map(lambda a, at=layer: a[at : at + 1], pair))
                streams[i] = jax.block_until_ready(run(nnx.split(part.layers)[1], streams[i]))
            advance()
        nnx.update(part, blank)
        for under in ("norm", "embed" if sizes.tie_word_embeddings else "head"):
            streaming.fill(part, files, folder, under=under)
    return [np.asarray(part.logits(part.norm(x))[0]) for x in streams]


def layers_in(sizes: Architecture) -> int:
    """Layers of the checkpoint in one of the model's: a BlackMamba's come in pairs, a mixer and experts."""
    return 1 if isinstance(sizes, MixtralConfig) else 2


def _pairs(whole: Model, adapter: Path) -> nnx.State:
    """An adapter's A and B, stacked over all layers."""
    peft.load_adapter(whole, adapter)
    return jax.tree.map(jnp.asarray, nnx.state(whole.layers, nnx.LoRAParam))  # a state of its own: `whole` may read another one


def _runner(part: Model, length: int) -> Callable[[nnx.State, jax.Array], jax.Array]:
    """The compiled function of one layer: its weights, and the stream [1, T, D] before it -> the stream after it."""
    graphdef = nnx.split(part.layers)[0]
    segment_ids = jnp.ones((1, length), jnp.int32)
    positions = (jnp.arange(length)[None],) if isinstance(part, Mixtral) else ()

    @jax.jit
    def run(state: nnx.State, x: jax.Array) -> jax.Array:
        layer: Any = nnx.merge(graphdef, jax.tree.map(lambda a: a[0], state))
        return layer(x, segment_ids, *positions, None, False)[0]

    return run


def _of_layer(files: dict[str, Any], layer: int, count: int) -> dict[str, Any]:
    """The checkpoint's tensors of one of our layers, under the names of a model that has no other."""
    out = {}
    for name, source in files.items():
        match = _LAYER.match(name)
        if match and int(match[2]) // count == layer:
            out[f"{match[1]}.{int(match[2]) % count}.{name[match.end() :]}"] = source
    return out
