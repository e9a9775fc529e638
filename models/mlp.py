"""A gated feed-forward that every token meets: of dense layers, and of the experts that a mixture shares."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from moejax.models.config import Architecture, specs
from moejax.models.layers import Linear, Target, fold


class MLP(nnx.Module):
    """w2(silu(w1 x) · w3 x)."""

    def __init__(self, key: jax.Array, spec: specs.MLP, config: Architecture, dtype: Any, target: Target, scope: str = "dequant"):
        keys = jax.random.split(key, 3)
        d, f = config.hidden_size, spec.hidden
        self.w1 = Linear(keys[0], d, f, dtype, scope=scope, axes=("hidden", "embed"))
        self.w2 = Linear(keys[1], f, d, dtype, scope=scope, axes=("embed", "hidden"))
        self.w3 = Linear(keys[2], d, f, dtype, scope=scope, axes=("hidden", "embed"))

    def product(self, x: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        """x: [N, D] -> [N, D]. dropout_key: one, or of as many micro-batches, whose rows stand one after the other."""
        up, gate = self.w1(x, fold(dropout_key, 14)), self.w3(x, fold(dropout_key, 15))
        return self.w2(jax.nn.silu(up) * gate, fold(dropout_key, 16))

    def __call__(
        self, x: jax.Array, valid: jax.Array, dropout_key: jax.Array | None = None, *, keep: bool = False, micro_batches: int | None = None
    ) -> tuple[jax.Array, None]:
        """As a `MoE` is called; there are no choices to be counted."""
        with jax.named_scope("mlp"):
            return self.product(x, dropout_key), None
