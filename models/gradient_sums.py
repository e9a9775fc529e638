"""Gradients of a stack's layers, added to sums in place: what the micro-batches of a step have instead of a gradient tree each.

The sums go through the scan over layers as they are. Backwards what comes in for them are the sums so far, carried from layer to layer,
and each layer adds its own gradients to its place in them: no more than one layer's are ever apart.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Path = tuple[Any, ...]


class GradientSums:
    """What a model adds the gradients of its stacks to, while it is `model.gradient_sums`. tree: as the trainable weights, [L, …] a stack.

    Their values are not used. After a differentiated pass the cotangent of `tree` as it was is that of `tree` as it is, and the gradients
    of all passes of the stacks that went through it; those weights themselves have none. A pass inside another transformation of jax
    (a caller's own loop or `jax.checkpoint` around the model) leaves it alone, and its weights have their gradients as ever.
    """

    def __init__(self, tree: nnx.State):
        self.tree = tree
        self._trace = nnx.tracers.TraceState()

    def of(self, stack: str, layers: nnx.State) -> dict[Path, jax.Array]:
        """Those of the trained weights among a stack's layers; none where the pass leaves them alone."""
        if not self._trace.is_valid():
            return {}
        found = trained(layers)
        return {path[1:]: v.get_value() for path, v in nnx.to_flat_state(self.tree) if path[0] == stack and path[1:] in found}

    def put(self, stack: str, sums: dict[Path, jax.Array]) -> None:
        """The same, as they came out of the stack."""
        self.tree = _with(self.tree, {(stack, *path): value for path, value in sums.items()})


def trained(layers: nnx.State) -> dict[Path, jax.Array]:
    """The trained weights among a stack's layers."""
    return {path: v.get_value() for path, v in nnx.to_flat_state(layers) if isinstance(v, nnx.Param)}


def without_gradients(layers: nnx.State, paths: Any) -> nnx.State:
    """A stack's layers, with the weights at these paths for constants."""
    return _with(layers, {path: jax.lax.stop_gradient(v.get_value()) for path, v in nnx.to_flat_state(layers) if path in paths})


def added(layer: nnx.State, sums: dict[Path, jax.Array], index: jax.Array) -> tuple[nnx.State, dict[Path, jax.Array]]:
    """(layer, sums) as they are: layer `index` of a stack, [L, …] of its weights. Backwards the layer's gradients go to the sums."""
    if not sums:
        return layer, sums
    weights = {path: v.get_value() for path, v in nnx.to_flat_state(layer) if path in sums}
    weights, sums = _added(weights, sums, index)
    return _with(layer, weights), sums


def marked(sums: dict[Path, jax.Array], index: jax.Array) -> tuple[dict[Path, jax.Array], dict[Path, jax.Array]]:
    """(a mark of each weight, sums as they are). What comes in for the marks backwards goes to the sums as layer `index`'s gradients."""
    marks, sums = _added({path: jnp.zeros(whole.shape[1:], whole.dtype) for path, whole in sums.items()}, sums, index)
    return marks, sums


def layer_in_place(layers: nnx.State, marks: dict[Path, jax.Array], index: jax.Array) -> nnx.State:
    """Layer `index` of a stack, read where it lies; the gradients of its trained weights go to their marks."""
    layer = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), layers)
    return _with(layer, {path: _instead(v.get_value(), marks[path]) for path, v in nnx.to_flat_state(layer) if path in marks})


@jax.custom_vjp
def settled(x: jax.Array, sums: dict[Path, jax.Array]) -> tuple[jax.Array, dict[Path, jax.Array]]:
    """(x, sums) as they are. Backwards nothing goes on from x before all has gone to the sums that goes to them behind it."""
    return x, sums


settled.defvjp(lambda x, sums: ((x, sums), None), lambda _, cotangents: jax.lax.optimization_barrier(cotangents))


@jax.custom_vjp
def _instead(weight: jax.Array, mark: jax.Array) -> jax.Array:
    return weight


_instead.defvjp(lambda weight, mark: (weight, None), lambda _, gradient: (None, gradient))


def _with(state: nnx.State, values: dict[Path, jax.Array]) -> nnx.State:
    return nnx.from_flat_state([(path, v.replace(values[path]) if path in values else v) for path, v in nnx.to_flat_state(state)])


@jax.custom_vjp
def _added(weights: Any, sums: Any, index: jax.Array) -> tuple[Any, Any]:
    return weights, sums


def _backward(index: jax.Array, cotangents: tuple[Any, Any]) -> tuple[None, Any, None]:
    gradients, sums = cotangents

    def add(sums: jax.Array, gradient: jax.Array) -> jax.Array:
        layer = jax.lax.dynamic_index_in_dim(sums, index, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(sums, layer + gradient, index, 0)

    return None, jax.tree.map(add, sums, gradients), None


_added.defvjp(lambda weights, sums, index: ((weights, sums), index), _backward)
