"""Mixtral, assembled: the architecture on one page.

    x = embed(tokens)
    for every layer:  x += attention(norm(x));  x += moe(norm(x))
    logits = head(norm(x))

The layers are one module whose weights are stacked [L, …]; `jax.lax.scan` runs them, each body recomputed in the backward pass if
`remat` says so.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moejax.models.attention import Attention, KeyValues
from moejax.models.config import MixtralConfig
from moejax.models.layers import Embedding, LanguageModel, Linear, RMSNorm, rematerialized, scannable, stack_layers
from moejax.models.moe import MoE, RouterStats
from moejax.models.ops.grouped_choice import here


class DecoderLayer(nnx.Module):
    """x += attention(norm(x)); x += moe(norm(x))."""

    def __init__(self, key: jax.Array, config: MixtralConfig, dtype: Any, backend: str, platform: str):
        keys = jax.random.split(key)
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.attention = Attention(keys[0], config, dtype)
        self.moe_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.moe = MoE(keys[1], config, dtype, backend, platform)

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array, positions: jax.Array, dropout_key: jax.Array | None, keep: bool
    ) -> tuple[jax.Array, RouterStats]:
        x = x + self.attention(self.attention_norm(x), segment_ids, positions, dropout_key)
        x = checkpoint_name(x, "halfway")
        return self._experts(x, segment_ids > 0, dropout_key, keep)

    def cached(
        self, x: jax.Array, valid: jax.Array, positions: jax.Array, cache: KeyValues, layer: jax.Array
    ) -> tuple[jax.Array, KeyValues]:
        """The same layer, number `layer`, for tokens [B, T] at `positions`, over the keys and values seen so far."""
        out, cache = self.attention.cached(self.attention_norm(x), positions, cache, layer)
        return self._experts(x + out, valid, None, False)[0], cache

    def _experts(
        self, x: jax.Array, valid: jax.Array, dropout_key: jax.Array | None, keep: bool
    ) -> tuple[jax.Array, RouterStats]:
        rows = self.moe_norm(x).reshape(-1, x.shape[-1])
        out, stats = self.moe(rows, valid.reshape(-1), dropout_key, keep=keep)
        return x + out.reshape(x.shape), stats


class Mixtral(LanguageModel):
    """tokens [B, T] -> hidden states [B, T, D]; `logits` maps those to the vocabulary.

    dtype: what is computed in. param_dtype: what weights are stored in. platform: what the program is compiled for.
    """

    def __init__(
        self,
        config: MixtralConfig,
        key: jax.Array,
        *,
        dtype: Any,
        param_dtype: Any,
        backend: str = "auto",
        platform: str | None = None,
    ):
        keys = jax.random.split(key, 3)
        platform = platform or here()
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.embed = Embedding(keys[0], config.vocab_size, config.hidden_size, param_dtype)
        self.layers = stack_layers(
            lambda k: DecoderLayer(k, config, param_dtype, backend, platform), keys[1], config.num_layers
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype)
        if not config.tie_word_embeddings:
            self.head = Linear(
                keys[2], config.hidden_size, config.vocab_size, param_dtype, scope="head_dequant", axes=("vocab", "embed")
            )

    def __call__(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array,
        positions: jax.Array,
        *,
        remat: str = "none",
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, RouterStats]:
        """tokens, segment_ids (0 = padding), positions: int32 [B, T]. Returns hidden states [B, T, D] and stats [L, …]."""
        state, layer_of = scannable(self.layers)

        def body(x: jax.Array, layer: tuple[nnx.State, jax.Array]) -> tuple[jax.Array, RouterStats]:
            weights, index = layer
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
            return layer_of(weights, index)(x, segment_ids, positions, key, remat != "full")

        xs = (state, jnp.arange(self.config.num_layers))
        x = self.embed(tokens, self.dtype)
        with jax.named_scope("layers"):
            x, stats = jax.lax.scan(rematerialized(body, remat), x, xs)
        return self.norm(x), stats

    def init_cache(self, batch: int, length: int) -> KeyValues:
        """Empty keys and values: zeros [L, B, G, S, C]."""
        c = self.config
        shape = (c.num_layers, batch, c.num_kv_heads, length, c.head_dim)
        return KeyValues(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))

    def cached(
        self, tokens: jax.Array, valid: jax.Array, positions: jax.Array, cache: KeyValues
    ) -> tuple[jax.Array, KeyValues]:
        """The forward pass over a cache [L, B, G, S, C]: what `moejax.models.cache` is made of. Inference only."""
        graphdef, state = nnx.split(self.layers)

        def body(carry: tuple[jax.Array, KeyValues], layer: tuple[nnx.State, jax.Array]) -> tuple[tuple[jax.Array, KeyValues], None]:
            (x, kv), (weights, number) = carry, layer
            return nnx.merge(graphdef, weights).cached(x, valid, positions, kv, number), None

        numbers = jnp.arange(self.config.num_layers)
        (x, cache), _ = jax.lax.scan(body, (self.embed(tokens, self.dtype), cache), (state, numbers))
        return self.norm(x), cache


def load_balancing_loss(stats: RouterStats, tokens: jax.Array) -> jax.Array:
    """Switch-style auxiliary loss over all layers together, as transformers' `load_balancing_loss_func` with a padding mask.

    stats: [L, E]; tokens: number of real tokens. E · Σ_e (share of choices that fall on e) · (mean probability of e).
    """
    layers, experts = stats.counts.shape
    total = jnp.maximum(tokens, 1).astype(jnp.float32) * layers
    share = jnp.sum(stats.counts, axis=0).astype(jnp.float32) / total
    probability = jnp.sum(stats.probabilities, axis=0) / total
    return experts * jnp.sum(share * probability)
