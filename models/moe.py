"""The mixture of experts: a router, and gated experts that run sparse (top-k) or dense (all), as modules of one kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moejax.models.config import Architecture, specs
from moejax.models.layers import ExpertLinear, Frozen, Linear, Target, fold, trainable
from moejax.models.mlp import MLP
from moejax.models.ops import linear
from moejax.models.ops.choice import is_tpu
from moejax.models.ops.grouped import matmul as gm
from moejax.models.ops.spread import AXIS, all_rows, own_rows


class RouterStats(NamedTuple):
    """Of one layer (or stacked, [L, …]), over real tokens. counts: int32 [E], choices per expert; probabilities: fp32 [E], sums."""

    counts: jax.Array
    probabilities: jax.Array


class Router(Linear):
    """The logits. choice_bias: fp32 [E] or None; in the place of the scores their sum with it decides who is chosen."""

    def __init__(self, key: jax.Array, spec: specs.Router, size: int, experts: int, dtype: Any):
        super().__init__(key, size, experts, dtype, scope="router_dequant", axes=("experts", "embed"), bias=spec.bias)
        bias = Frozen(jnp.zeros(experts, jnp.float32), axes=("experts",)) if spec.choice_bias else None
        self.choice_bias: Frozen | None = nnx.data(bias)


class MoE(nnx.Module):
    """out = Σ over the chosen experts of p_e · w2_e(act(w1_e x) · w3_e x), and what the shared MLP gives, if there is one.

    p: softmax or sigmoids of the router's logits → top-k → divided by their sum, and times a number, if the spec says so. act: silu,
    gelu (erf), or gpt-oss's.

    The weight p_e multiplies the activation before w2: the same sum, but w2 need not be recomputed in the backward pass.
    """

    def __init__(self, key: jax.Array, spec: specs.MoE, config: Architecture, dtype: Any, target: Target):
        keys = jax.random.split(key, 4)
        self.shared: MLP | None = nnx.data(None)
        if spec.shared is not None:
            self.shared = MLP(jax.random.fold_in(key, 4), spec.shared, config, dtype, target, scope="shared_dequant")
        e, d, f = spec.experts, config.hidden_size, spec.hidden
        self.router = Router(keys[0], spec.router, d, e, dtype)
        self.w1 = ExpertLinear(keys[1], e, d, f, dtype, axes=("hidden", "embed"), bias=spec.bias)
        self.w2 = ExpertLinear(keys[2], e, f, d, dtype, axes=("embed", "hidden"), bias=spec.bias)
        self.w3 = ExpertLinear(keys[3], e, d, f, dtype, axes=("hidden", "embed"), bias=spec.bias)
        self.experts, self.k = e, spec.experts_per_token
        self.scores, self.rule, self.gated = SCORES[spec.router.kind], spec.router, gated(spec.activation)
        self.target, self.choices_first = target, is_tpu(target.platform)

    def __call__(
        self, x: jax.Array, valid: jax.Array, dropout_key: jax.Array | None = None, *, keep: bool = False, micro_batches: int | None = None
    ) -> tuple[jax.Array, RouterStats]:
        """x: [N, D]; valid: bool [N], false for padding, which visits no expert; keep: save hidden rows for the backward pass.
        micro_batches: the tokens are of this many, one after the other, with a key each; stats are then [A, E]."""
        with jax.named_scope("moe"):
            indices, weights, stats = self._route(x, valid, dropout_key, () if micro_batches is None else (micro_batches,))
            held = linear.count(self.w1.weight.get_value())
            if held < self.experts:
                out = self._on_own_devices(x, indices, weights, valid, dropout_key, keep, held)
            elif self.k == self.experts:
                out = self._dense(x, weights, dropout_key)
            else:
                out = self._sparse(x, indices, weights, valid, dropout_key, keep, held)
            if self.shared is None:
                return out, stats
            with jax.named_scope("shared"):
                return out + self.shared.product(x, dropout_key), stats

    def _route(
        self, x: jax.Array, valid: jax.Array, dropout_key: jax.Array | None, parts: tuple[int, ...] = ()
    ) -> tuple[jax.Array, jax.Array, RouterStats]:
        """indices: int32 [N, K]; weights: fp32 [N, K], of all experts [N, E] in a dense model. On a TPU [K, N]: see `gm.ChoicesFirst`."""
        with jax.named_scope("router"):
            logits = self.router(x.astype(jnp.float32), fold(dropout_key, 10))  # [N, E], fp32
            probabilities = self.scores(logits)
        sums = jnp.sum((probabilities * valid[:, None]).reshape(*parts, -1, self.experts), axis=-2)
        if self.k == self.experts:
            counts = jnp.broadcast_to(jnp.sum(valid.reshape(*parts, -1, 1), axis=-2, dtype=jnp.int32), sums.shape)
            return jnp.zeros((x.shape[0], 0), jnp.int32), self._weights(probabilities), RouterStats(counts, sums)
        with jax.named_scope("topk"):
            indices, own = _narrow(self.choose(probabilities), self.experts), () if self.choices_first else (None,)
            indices = checkpoint_name(indices.T if self.choices_first else indices, "router_indices").astype(jnp.int32)
            chosen = indices[..., None] == jnp.arange(self.experts)
            # One of the summands is not zero: a gather, but one whose gradient is no scatter.
            picked = jnp.sum(jnp.where(chosen, probabilities[(slice(None), *own)], 0.0), axis=-1)
            weights = checkpoint_name(self._weights(picked, 0 if self.choices_first else -1), "router_weights")
            visits = chosen & valid[(slice(None), *own, None)]
            if self.choices_first:
                visits = visits.any(axis=0)  # a token chooses an expert once
            counts = jnp.sum(visits.reshape(*parts, -1, self.experts), axis=-2, dtype=jnp.int32)
        return indices, weights, RouterStats(counts, sums)

    def _weights(self, picked: jax.Array, axis: int = -1) -> jax.Array:
        """fp32 [N, K] of the scores of the chosen experts, the choices on this axis."""
        if self.rule.renormalize and not (self.k == self.experts and self.rule.kind == "softmax"):  # that one sums to one by itself
            total = jnp.sum(picked, axis=axis, keepdims=True)
            picked = picked / (total + 1e-20 if self.rule.kind == "sigmoid" else total)  # sigmoids may all be zero
        return picked if self.rule.scale == 1.0 else picked * self.rule.scale

    def choose(self, probabilities: jax.Array) -> jax.Array:
        """The experts that each token visits, by fp32 [N, E]: int32 [N, K]."""
        return jax.lax.top_k(jax.lax.stop_gradient(self.ranked(probabilities)), self.k)[1].astype(jnp.int32)

    def ranked(self, probabilities: jax.Array) -> jax.Array:
        """fp32 [N, E]: what experts are chosen by."""
        bias = self.router.choice_bias
        return probabilities if bias is None else probabilities + bias.get_value()

    def plan(self, rows: int, width: int, dtype: Any, backend: str | None = None, dealt: bool = False) -> gm.Plan:
        """How this many rows pass the experts. backend: in the place of the model's; dealt: each device has some of them."""
        weight, target = self.w1.weight.get_value(), self.target
        return gm.choose(
            backend or target.backend, target.platform, rows, self.experts, self.k,
            hidden=width, intermediate=linear.out_size(weight), quantized=linear.in_4_bits(weight), item=dtype.itemsize,
            memory_bytes=target.memory_bytes, dealt=dealt,
        )  # fmt: skip

    def _on_own_devices(
        self, x: jax.Array, indices: jax.Array, weights: jax.Array, valid: jax.Array, dropout_key: jax.Array | None, keep: bool, held: int
    ) -> jax.Array:
        """Each device has `held` of the experts: it takes the tokens of all devices through its own, and what it gives for them is added up
        where they came from. Nothing is dropped for any routing, and shapes are static."""
        with jax.named_scope("all_gather"):
            of_tokens = int(self.choices_first and self.k < self.experts)
            x, valid, weights = all_rows(x), all_rows(valid), all_rows(weights, of_tokens)
            first = held * jax.lax.axis_index(AXIS)
        if self.k == self.experts:
            out = self._dense(x, jax.lax.dynamic_slice_in_dim(weights, first, held, axis=1), dropout_key)
        else:
            with jax.named_scope("all_gather"):
                own = all_rows(indices, of_tokens) - first
            # The others' are sorted behind the last group, as padding is.
            out = self._sparse(x, jnp.where((own >= 0) & (own < held), own, held), weights, valid, dropout_key, keep, held)
        with jax.named_scope("reduce_scatter"):
            return own_rows(out)

    def _sparse(
        self, x: jax.Array, indices: jax.Array, weights: jax.Array, valid: jax.Array, dropout_key: jax.Array | None, keep: bool, held: int
    ) -> jax.Array:
        weight, prefetch = self.w1.weight.get_value(), self.target.prefetch
        # One by one is how the loop takes them: `capacity` multiplies a layer at once.
        backend = "loop" if prefetch == "experts" and linear.in_host(weight) else self.target.backend
        if prefetch == "auto":  # a CPU has one memory: nothing to wait for
            prefetch = "" if self.target.platform == "cpu" else "experts"
        plan = self.plan(x.shape[0], x.shape[1], x.dtype, backend, held < self.experts)._replace(
            activation=self.gated, trainable=trainable(self.w1.weight), keep=keep, dropout=self._dropout, prefetch=prefetch
        )  # fmt: skip
        with jax.named_scope("dispatch"):
            groups = gm.group(indices, valid, held, plan.tile, first=self.choices_first)
            most = groups.position.size
            groups = type(groups)(*(checkpoint_name(_narrow(a, most), "dispatch").astype(jnp.int32) for a in groups))
            row_weights = gm.sort_weights(weights, groups).astype(x.dtype)  # [M]
        up, gate, output = (m.projection() for m in (self.w1, self.w3, self.w2))
        keys = gm.row_keys(fold(dropout_key, 11), groups) if self._dropout else None
        return gm.grouped_mlp(plan, x, row_weights, groups, (up, gate), output, keys)

    @property
    def _dropout(self) -> float:
        return next((m.lora.dropout for m in (self.w1, self.w2, self.w3) if m.lora is not None), 0.0)

    def _dense(self, x: jax.Array, weights: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        up, low = self._batched("w1", "nd,efd->enf", x, fold(dropout_key, 11))
        gate, _ = self._batched("w3", "nd,efd->enf", x, fold(dropout_key, 13), low)
        up, gate = (y if b is None else y + b for y, b in ((up, self._bias("w1", x.dtype)), (gate, self._bias("w3", x.dtype))))
        up, gate = checkpoint_name(up, "hidden"), checkpoint_name(gate, "hidden")
        with jax.named_scope("act"):
            activation = self.gated(up, gate) * weights.astype(x.dtype).T[..., None]  # [E, N, F]
        out, bias = self._batched("w2", "enf,edf->nd", activation, fold(dropout_key, 12))[0], self.w2.bias
        return out if bias is None else out + weights.astype(x.dtype) @ bias.get_value().astype(x.dtype)

    def _bias(self, name: str, dtype: Any) -> jax.Array | None:
        """[E, 1, F] of a matrix whose products are [E, N, F]."""
        bias: nnx.Variable | None = getattr(self, name).bias
        return None if bias is None else bias.get_value().astype(dtype)[:, None]

    def _batched(
        self, name: str, product: str, x: jax.Array, dropout_key: jax.Array | None, low: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """The product, and the adapter's low-rank rows [E, N, R]. low: those of an adapter whose A this one shares."""
        module: ExpertLinear = getattr(self, name)
        with jax.named_scope(name):
            y = gm.dense_matmul(product, x, module.weight.get_value(), name, trainable=trainable(module.weight))
            if module.lora is None:
                return y, None
            with jax.named_scope("lora"):
                a, b = module.lora.weights()
                inputs, output = product.split("->")
                x_axes, w_axes = inputs.split(",")
                if a is not None:
                    dropped = module.lora.dropped(x, dropout_key, x_axes.index("n"))
                    low = jnp.einsum(f"{x_axes},er{w_axes[-1]}->enr", dropped, a.astype(x.dtype))
                return y + jnp.einsum(f"enr,e{w_axes[1]}r->{output}", low, b.astype(x.dtype)), low


def _narrow(x: jax.Array, most: int) -> jax.Array:
    """Numbers from 0 to `most`, as the smallest integers that hold them: what each layer saves for the backward pass."""
    return x.astype(jnp.uint8 if most < 2**8 else jnp.uint16 if most < 2**16 else jnp.int32)


def _silu_gated(up: jax.Array, gate: jax.Array) -> jax.Array:
    return jax.nn.silu(up) * gate


def _gelu_gated(up: jax.Array, gate: jax.Array) -> jax.Array:
    if up.dtype == jnp.float32:
        # torch's form. jax.nn.gelu is made of erfc, which takes a CPU three times as long; in bf16 1 + erf would cancel.
        return 0.5 * up * (1.0 + jax.lax.erf(up * 0.5**0.5)) * gate
    return jax.nn.gelu(up, approximate=False) * gate


@dataclass(frozen=True)
class _Clamped:
    """gpt-oss's gate, of transformers' `GptOssExperts`."""

    spec: specs.ClampedSwiGLU

    def __call__(self, up: jax.Array, gate: jax.Array) -> jax.Array:
        alpha, limit = self.spec.alpha, self.spec.limit
        up, gate = jnp.minimum(up, limit), jnp.clip(gate, -limit, limit)
        return up * jax.nn.sigmoid(alpha * up) * (gate + 1)


def gated(activation: str | specs.ClampedSwiGLU) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The hidden row of the rows of w1 and w3."""
    return _Clamped(activation) if isinstance(activation, specs.ClampedSwiGLU) else GATED[activation]


GATED = {"silu": _silu_gated, "gelu": _gelu_gated}
SCORES = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}
