"""LoRA (arXiv 2106.09685): y += alpha/rank · B(A(dropout(x))). One pair per linear layer and per expert, as PEFT 0.18 means it; or one A
for the two matrices of an expert that read the same rows, as PEFT from 0.19 on trains fused experts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.models.config.adapters import Pair
from moejax.models.ops.grouped.matmul import LoRAWeights


class LoRA(nnx.Module):
    """A: [..., R, in], uniform as PEFT draws it (±1/sqrt(in)); B: [..., out, R], zero. fp32; leading axes are layers, experts.

    shares: the module next to it whose adapter's A it takes; then it has none of its own.
    """

    def __init__(self, key: jax.Array, leading: tuple[int, ...], in_size: int, out_size: int, pair: Pair, dropout: float, axes: Any):
        self.a: nnx.LoRAParam | None = nnx.data(None)
        if pair.shares is None:
            bound = in_size**-0.5
            a = jax.random.uniform(key, (*leading, pair.rank, in_size), jnp.float32, -bound, bound)
            self.a = nnx.LoRAParam(a, axes=(*axes[:-2], "rank", axes[-1]))
        self.b = nnx.LoRAParam(jnp.zeros((*leading, out_size, pair.rank), jnp.float32), axes=(*axes[:-1], "rank"))
        self.scale, self.dropout, self.shares = pair.scale, dropout, pair.shares

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        """x: [..., in] -> [..., out], for a pair without leading axes."""
        with jax.named_scope("lora"):
            assert self.a is not None  # only experts' matrices share one
            low = self.dropped(x, dropout_key) @ self.a.get_value().astype(x.dtype).T
            return low @ (self.scale * self.b.get_value()).astype(x.dtype).T

    def weights(self) -> LoRAWeights:
        """The pairs of all experts, with the scale in B."""
        return LoRAWeights(None if self.a is None else self.a.get_value(), self.scale * self.b.get_value())

    def pair(self) -> Pair:
        rank = self.b.get_value().shape[-1]
        return Pair(rank, self.scale * rank, self.shares)

    def owner(self, path: tuple[str, ...]) -> tuple[str, ...]:
        """Where the module is whose adapter has the A of this one, an adapter on the module at `path`."""
        return path if self.shares is None else (*path[:-1], self.shares)

    def dropped(self, x: jax.Array, dropout_key: jax.Array | None, axis: int = 0) -> jax.Array:
        """x after dropout; without a key (evaluation) or with probability zero, x itself. Keys [A]: of as many micro-batches that stand
        one after the other on `axis`, each with the mask that it would have alone."""
        if dropout_key is None or self.dropout == 0.0:
            return x
        if dropout_key.ndim:
            each = (*x.shape[:axis], x.shape[axis] // dropout_key.shape[0], *x.shape[axis + 1 :])
            masks = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - self.dropout, each))(dropout_key)
            keep = jnp.moveaxis(masks, 0, axis).reshape(x.shape)
        else:
            keep = jax.random.bernoulli(dropout_key, 1.0 - self.dropout, x.shape)
        return jnp.where(keep, x / (1.0 - self.dropout), jnp.zeros((), x.dtype))
