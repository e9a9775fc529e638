"""The Mamba mixer (arXiv 2312.00752) as BlackMamba has it: gated, with a short causal convolution before a selective scan."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.models.config import Architecture, specs
from moejax.models.layers import Linear, Target
from moejax.models.ops import choice
from moejax.models.ops import selective_scan as ss


class MambaState(NamedTuple):
    """What layers remember of a sequence. conv: the last K-1 inputs of the convolution, [L, B, K-1, D]; scan: fp32 [L, B, D, N]."""

    conv: jax.Array
    scan: jax.Array


class Conv(nnx.Module):
    """Causal depthwise convolution over time, y[t] = b + Σ_j w[:, j] x[t - K + 1 + j]. weight: [D, K]; bias: [D]."""

    def __init__(self, key: jax.Array, channels: int, size: int, dtype: Any):
        bound = size**-0.5
        weight = jax.random.uniform(key, (channels, size), jnp.float32, -bound, bound)
        self.weight: nnx.Variable = nnx.Param(weight.astype(dtype), axes=("channels", "taps"))
        self.bias: nnx.Variable = nnx.Param(jnp.zeros(channels, dtype), axes=("channels",))
        self.size = size

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None, before: jax.Array | None = None) -> jax.Array:
        """x: [B, T, D]; segment_ids: int32 [B, T], a tap never reaches another segment (None: one segment); before: [B, K-1, D], the
        inputs before x (None: zeros)."""
        t, reach = x.shape[1], self.size - 1
        past = jnp.zeros((x.shape[0], reach, x.shape[2]), x.dtype) if before is None else before.astype(x.dtype)
        longer = jnp.concatenate([past, x], axis=1)
        weight = self.weight.get_value().astype(x.dtype)
        y = self.bias.get_value().astype(x.dtype) + weight[:, reach] * x
        for back in range(1, self.size):
            tap = longer[:, reach - back : reach - back + t]
            if segment_ids is not None:
                source = jnp.pad(segment_ids, ((0, 0), (back, 0)), constant_values=-1)[:, :t]
                tap = jnp.where((source == segment_ids)[..., None], tap, jnp.zeros((), x.dtype))
            y = y + weight[:, reach - back] * tap
        return y


class Mamba(nnx.Module):
    """x: [B, T, H] -> [B, T, H].

        [x' | z] = W_in x;  u = silu(conv(x'));  [dt' | B | C] = W_x u;  dt = softplus(W_dt dt' + b_dt)
        out = W_out (scan(u, dt, -exp(A_log), B, C, D) · silu(z))

    dt, the scan and the gate in fp32, the products in the compute dtype.
    """

    splits_recomputation = False  # a layer is recomputed as a whole

    def __init__(self, key: jax.Array, spec: specs.Mamba, config: Architecture, dtype: Any, target: Target):
        keys = jax.random.split(key, 6)
        h, d, n, r = config.hidden_size, spec.inner, spec.state, spec.rank
        scope = "dequant"
        self.in_proj = Linear(keys[0], h, 2 * d, dtype, scope=scope, axes=("channels", "embed"))
        self.conv = Conv(keys[1], d, spec.conv, dtype)
        self.x_proj = Linear(keys[2], d, r + 2 * n, dtype, scope=scope, axes=("rank", "channels"))
        self.dt_proj = Linear(keys[3], r, d, dtype, scope=scope, axes=("channels", "rank"))
        # Steps between 0.001 and 0.1 to begin with, and decays of 1 … N, as Mamba does.
        first = jnp.exp(jax.random.uniform(keys[4], (d,), jnp.float32, jnp.log(1e-3), jnp.log(0.1)))
        self.dt_bias: nnx.Variable = nnx.Param((first + jnp.log(-jnp.expm1(-first))).astype(dtype), axes=("channels",))
        a_log = jnp.broadcast_to(jnp.log(jnp.arange(1, n + 1, dtype=jnp.float32)), (d, n))
        self.a_log: nnx.Variable = nnx.Param(a_log.astype(dtype), axes=("channels", "state"))
        self.d: nnx.Variable = nnx.Param(jnp.ones(d, dtype), axes=("channels",))
        self.out_proj = Linear(keys[5], d, h, dtype, scope=scope, axes=("embed", "channels"))
        self.sizes, self.target = (r, n), target

    @staticmethod
    def empty(spec: specs.Mamba, layers: int, batch: int, length: int, dtype: Any) -> MambaState:
        """Of sequences that hold nothing: zeros. They do not grow with `length`."""
        conv = jnp.zeros((layers, batch, spec.conv - 1, spec.inner), dtype)
        return MambaState(conv, jnp.zeros((layers, batch, spec.inner, spec.state), jnp.float32))

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array, positions: jax.Array | None = None, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """segment_ids: int32 [B, T]; nothing passes from one segment to the next. Positions are not used, and nothing is dropped."""
        with jax.named_scope("mamba"):
            both = self.in_proj(x)
            inner = jnp.split(both, 2, axis=-1)[0]
            with jax.named_scope("conv"):
                u = jax.nn.silu(self.conv(inner, segment_ids))
            before = jnp.pad(segment_ids, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
            return self._scan(u, both, segment_ids != before, None, None)[0]

    def cached(
        self, x: jax.Array, valid: jax.Array, positions: jax.Array, cache: MambaState, layer: jax.Array
    ) -> tuple[jax.Array, MambaState]:
        """The same for tokens that follow the state of `layer`. valid: bool [B, T], false for right padding, which changes no state."""
        state = MambaState(*(held[layer] for held in cache))
        with jax.named_scope("mamba"):
            both = self.in_proj(x)
            inner = jnp.split(both, 2, axis=-1)[0]
            with jax.named_scope("conv"):
                u = jax.nn.silu(self.conv(inner, None, state.conv))
            out, scan = self._scan(u, both, None, valid, state.scan)
            held = jnp.concatenate([state.conv, inner.astype(state.conv.dtype)], axis=1)
            last = jnp.sum(valid, axis=1)[:, None] + jnp.arange(state.conv.shape[1])
            new = MambaState(jnp.take_along_axis(held, last[..., None], axis=1), scan)
            return out, MambaState(*(old.at[layer].set(value) for old, value in zip(cache, new, strict=True)))

    def _scan(
        self, u: jax.Array, both: jax.Array, starts: jax.Array | None, valid: jax.Array | None, state: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """both: what `in_proj` gave, z in its second half."""
        r, n = self.sizes
        low, b, c = jnp.split(self.x_proj(u), [r, r + n], axis=-1)
        raw = self.dt_proj(low)
        if valid is not None:
            raw = jnp.where(valid[..., None], raw, -jnp.inf)
        a, d, bias = (v.get_value().astype(jnp.float32) for v in (self.a_log, self.d, self.dt_bias))
        rows, length, channels = u.shape
        form, chunk = choice.scan(self.target.platform, rows, length, channels, self.target.scan)
        mixed, last = ss.gated(u, raw, -jnp.exp(a), b, c, d, bias, both, starts, state, form=form, chunk=chunk)
        return self.out_proj(mixed), last
