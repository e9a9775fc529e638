"""LoRA (arXiv 2106.09685) as PEFT 0.18 means it: y += alpha/rank · B(A(dropout(x))), one pair per linear layer and per expert."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.models.config.adapters import Pair
from moejax.models.ops.grouped.matmul import LoRAWeights


class LoRA(nnx.Module):
    """A: [..., R, in], uniform as PEFT draws it (±1/sqrt(in)); B: [..., out, R], zero. fp32; leading axes are layers, experts."""

    def __init__(self, key: jax.Array, leading: tuple[int, ...], in_size: int, out_size: int, pair: Pair, dropout: float, axes: Any):
        bound = in_size**-0.5
        a = jax.random.uniform(key, (*leading, pair.rank, in_size), jnp.float32, -bound, bound)
        self.a = nnx.LoRAParam(a, axes=(*axes[:-2], "rank", axes[-1]))
        self.b = nnx.LoRAParam(jnp.zeros((*leading, out_size, pair.rank), jnp.float32), axes=(*axes[:-1], "rank"))
        self.scale, self.dropout = pair.scale, dropout

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        """x: [..., in] -> [..., out], for a pair without leading axes."""
        with jax.named_scope("lora"):
            low = self.dropped(x, dropout_key) @ self.a.get_value().astype(x.dtype).T
            return low @ (self.scale * self.b.get_value()).astype(x.dtype).T

    def weights(self) -> LoRAWeights:
        """The pairs of all experts, with the scale in B."""
        return LoRAWeights(self.a.get_value(), self.scale * self.b.get_value())

    def dropped(self, x: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        """x after dropout; without a key (evaluation) or with probability zero, x itself."""
        if dropout_key is None or self.dropout == 0.0:
            return x
        keep = jax.random.bernoulli(dropout_key, 1.0 - self.dropout, x.shape)
        return jnp.where(keep, x / (1.0 - self.dropout), jnp.zeros((), x.dtype))
