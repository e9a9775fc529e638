"""BlackMamba, assembled: the architecture on one page.

    x = embed(tokens)                                      (the stream is fp32)
    for every pair of layers:  x += mamba(norm(x));  x += moe(norm(x))
    logits = embedᵀ(layer_norm(x))

The pairs are one module whose weights are stacked [L, …], L half the number of layers; `jax.lax.scan` runs them, each body recomputed in
the backward pass if `remat` says so. No attention, no positions; padding may only stand on the right.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.models.config import BlackMambaConfig
from moejax.models.layers import Embedding, LanguageModel, LayerNorm, RMSNorm, rematerialized, scannable, stack_layers
from moejax.models.mamba import Mamba, MambaState
from moejax.models.moe import MoE, RouterStats
from moejax.models.ops import selective_scan as ss
from moejax.models.ops.grouped_choice import here


class LayerPair(nnx.Module):
    """x += mamba(norm(x)); x += moe(norm(x)). x: fp32 [B, T, H], rounded to `compute` before each norm, as the released code does."""

    def __init__(
        self, key: jax.Array, config: BlackMambaConfig, dtype: Any, compute: Any, backend: str, scan: str, platform: str
    ):
        keys = jax.random.split(key)
        self.mamba_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype)
        self.mamba = Mamba(keys[0], config, dtype, scan, platform)
        self.moe_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype)
        self.moe = MoE(keys[1], config, dtype, backend, platform)
        self.compute = compute

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array, dropout_key: jax.Array | None, keep: bool
    ) -> tuple[jax.Array, RouterStats]:
        x = x + self.mamba(self.mamba_norm(x.astype(self.compute)), segment_ids).astype(jnp.float32)
        return self._experts(x, segment_ids > 0, dropout_key, keep)

    def cached(self, x: jax.Array, valid: jax.Array, state: MambaState) -> tuple[jax.Array, MambaState]:
        """The same layers for tokens that follow `state`."""
        out, state = self.mamba.cached(self.mamba_norm(x.astype(self.compute)), valid, state)
        return self._experts(x + out.astype(jnp.float32), valid, None, False)[0], state

    def _experts(
        self, x: jax.Array, valid: jax.Array, dropout_key: jax.Array | None, keep: bool
    ) -> tuple[jax.Array, RouterStats]:
        rows = self.moe_norm(x.astype(self.compute)).reshape(-1, x.shape[-1])
        out, stats = self.moe(rows, valid.reshape(-1), dropout_key, keep=keep)
        return x + out.reshape(x.shape).astype(jnp.float32), stats


def check_padding(real: jax.Array) -> None:
    """real: bool [B, T]. Raises ValueError for rows of no length, and (where the values are known) for padding before a token.

    Nothing masks padding in a recurrent model: on the left it would run through the state and the convolution that the first real token
    finds. On the right it comes too late to matter.
    """
    if real.shape[1] == 0:
        raise ValueError("the sequence length is 0: expected at least one token a row")
    if isinstance(real, jax.core.Tracer):
        return
    early = np.asarray(real[:, 1:] & ~real[:, :-1])
    if early.any():
        row, column = (int(i) for i in np.argwhere(early)[0])
        raise ValueError(
            f"row {row} has padding at {column} before a token at {column + 1}: a recurrent model would carry the padding in its state "
            "into the tokens behind it. Pad on the right"
        )


class BlackMamba(LanguageModel):
    """A causal language model. `__call__` returns hidden states; `logits` (or the chunked loss) applies the tied head.

    dtype: what is computed in. param_dtype: what weights are stored in. platform: what the program is compiled for.
    """

    def __init__(
        self,
        config: BlackMambaConfig,
        key: jax.Array,
        *,
        dtype: Any,
        param_dtype: Any,
        backend: str = "auto",
        scan: str = "auto",
        platform: str | None = None,
    ):
        keys = jax.random.split(key)
        platform = platform or here()
        ss.choose(scan, platform, 1, 1, 1)  # refuses a form that does not exist
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.embed = Embedding(keys[0], config.vocab_size, config.hidden_size, param_dtype)
        self.layers = stack_layers(
            lambda k: LayerPair(k, config, param_dtype, self.dtype, backend, scan, platform), keys[1], config.num_layers // 2
        )
        self.norm = LayerNorm(config.hidden_size, config.norm_eps, param_dtype)

    def __call__(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array,
        positions: jax.Array | None = None,
        *,
        remat: str = "none",
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, RouterStats]:
        """tokens, segment_ids (0 = padding): int32 [B, T]; positions are not used. Returns hidden states [B, T, H] and stats [L, …]."""
        check_padding(segment_ids > 0)
        state, layer_of = scannable(self.layers)

        def body(x: jax.Array, layer: tuple[nnx.State, jax.Array]) -> tuple[jax.Array, RouterStats]:
            weights, index = layer
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
            return layer_of(weights, index)(x, segment_ids, key, remat != "full")

        xs = (state, jnp.arange(self.config.num_layers // 2))
        x = self.embed(tokens, self.dtype).astype(jnp.float32)
        with jax.named_scope("layers"):
            x, stats = jax.lax.scan(rematerialized(body, remat), x, xs)
        return self.norm(x.astype(self.dtype)), stats

    def init_cache(self, batch: int, length: int) -> MambaState:
        """States of empty sequences: zeros, [L, B, K-1, D] and fp32 [L, B, D, N]. They do not grow with `length`."""
        c = self.config
        conv = jnp.zeros((c.num_layers // 2, batch, c.conv_size - 1, c.inner_size), self.dtype)
        return MambaState(conv, jnp.zeros((c.num_layers // 2, batch, c.inner_size, c.state_size), jnp.float32))

    def cached(
        self, tokens: jax.Array, valid: jax.Array, positions: jax.Array, cache: MambaState
    ) -> tuple[jax.Array, MambaState]:
        """The forward pass from states: what `moejax.models.cache` is made of. Inference only."""
        check_padding(valid)
        graphdef, state = nnx.split(self.layers)

        def body(x: jax.Array, layer: tuple[nnx.State, MambaState]) -> tuple[jax.Array, MambaState]:
            weights, held = layer
            return nnx.merge(graphdef, weights).cached(x, valid, held)

        x = self.embed(tokens, self.dtype).astype(jnp.float32)
        x, cache = jax.lax.scan(body, x, (state, cache))
        return self.norm(x.astype(self.dtype)), cache
