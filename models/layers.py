"""The small parts: variables, norms, linear layers, embedding, rotary positions.

Weights have torch's layout `[out, in]`. Every weight names its logical axes (`axes`: layers, experts, embed, hidden, heads, vocab,
rank), so that a mesh can be laid under the model later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moejax.models.config.rope import Rope
from moejax.models.lora import LoRA
from moejax.models.ops import host, linear
from moejax.models.ops.grouped.matmul import Projection
from moejax.models.ops.linear import OfLayer
from moejax.models.ops.split import pieces_of

INIT_STD = 0.02
REMAT_POLICIES = ("none", "dots", "full", "offload")
"""From the one that recomputes nothing to the one that keeps least on the device."""
ROUTING_NAMES = ("router_indices", "router_weights", "dispatch")
"""What every rematerialization policy keeps: recomputation must never change an expert choice."""
STREAM_NAME = "layer_input"
HALFWAY_NAMES = ("halfway", "attention_log_sums")
"""The stream between the two halves of a layer, and one number per query and head: each half is then recomputed by itself, and of
the attention only q, k and v (its output and what follows are needed for nothing but the stream)."""

DOT_NAMES = ("linear", "mixed", "flash_log_sums", "scan_states", "hidden")
"""What the products of a layer computed: of its linear layers, of the attention (and its softmax's sums) or the scan (and the scan's
states), of the experts."""


class Target(NamedTuple):
    """What a model is compiled for: the grouped products' backend ("auto": chosen by shape and memory), the platform and its memory, the
    attention ("auto": flash where it can run), by what experts in the host's memory are fetched (see `Placement`), and the form of the
    selective scan ("auto": `choice.scan`)."""

    backend: str
    platform: str
    memory_bytes: int | None = None
    attention: str = "auto"
    prefetch: str = "auto"
    scan: str = "auto"


class Placement(NamedTuple):
    """Where frozen weights lie: "device", or "host" (its pinned memory).

    experts: their matrices and block scales, or the number of layers whose are on the device, the first ones; tables: embedding and head;
    prefetch: experts come to the device by the "layer", or one by one ("experts") ahead of their products; "auto": as the grouped products'
    backend takes them.
    """

    experts: str | int = "device"
    tables: str = "device"
    prefetch: str = "auto"


ON_THE_DEVICE = Placement()


class Frozen(nnx.Variable):
    """A weight that is never trained: an array, or a `QuantizedTensor` (codes and scales)."""


def trainable(variable: nnx.Variable) -> bool:
    return isinstance(variable, nnx.Param)


class RMSNorm(nnx.Module):
    """x · rsqrt(mean(x²) + eps) · w over the last axis; statistics in fp32."""

    def __init__(self, size: int, eps: float, dtype: Any, axis: str = "embed"):
        self.weight: nnx.Variable = nnx.Param(jnp.ones(size, dtype), axes=(axis,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        with jax.named_scope("norm"):
            wide = x.astype(jnp.float32)
            normal = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
            return self.weight.get_value().astype(x.dtype) * normal.astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) · rsqrt(variance + eps) · w + b over the last axis; statistics in fp32."""

    def __init__(self, size: int, eps: float, dtype: Any):
        self.weight: nnx.Variable = nnx.Param(jnp.ones(size, dtype), axes=("embed",))
        self.bias: nnx.Variable = nnx.Param(jnp.zeros(size, dtype), axes=("embed",))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        with jax.named_scope("norm"):
            wide = x.astype(jnp.float32)
            centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
            normal = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
            weight, bias = (v.get_value().astype(jnp.float32) for v in (self.weight, self.bias))
            return (normal * weight + bias).astype(x.dtype)


class Linear(nnx.Module):
    """y = x Wᵀ (+ b), and the adapter's part if there is one. weight: [out, in]; bias: [out] or None."""

    def __init__(
        self, key: jax.Array, in_size: int, out_size: int, dtype: Any, *, scope: str, axes: tuple[str, str], bias: bool = False
    ):
        self.weight: nnx.Variable = nnx.Param(normal(key, (out_size, in_size), dtype), axes=axes)
        self.bias: nnx.Variable | None = nnx.data(nnx.Param(jnp.zeros(out_size, dtype), axes=axes[:1]) if bias else None)
        self.lora: LoRA | None = nnx.data(None)
        self.scope = scope

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        weight = self.weight.get_value()
        if trainable(self.weight):
            y = linear.matmul(weight.astype(x.dtype), x)
        else:
            y = linear.with_frozen(linear.matmul, self.scope, weight, x)
        if self.bias is not None:
            y = y + self.bias.get_value().astype(x.dtype)
        return checkpoint_name(y if self.lora is None else y + self.lora(x, dropout_key), "linear")

    def matrix(self, dtype: Any) -> jax.Array:
        """What x is multiplied by, [out, in], the adapter's part in it. For inference: what is differentiated must not keep it."""
        if self.lora is None:
            return linear.dequantized(self.weight.get_value(), dtype, self.scope)
        a, b = self.lora.weights()
        assert a is not None  # only experts' matrices share one
        return (linear.dequantized(self.weight.get_value(), jnp.float32, self.scope) + b @ a).astype(dtype)


class ExpertLinear(nnx.Module):
    """One matrix per expert. weight: [E, out, in]; bias: [E, out] or None. `moejax.models.moe` multiplies by it."""

    def __init__(
        self, key: jax.Array, experts: int, in_size: int, out_size: int, dtype: Any, *, axes: tuple[str, str], bias: bool = False
    ):
        self.weight: nnx.Variable = nnx.Param(normal(key, (experts, out_size, in_size), dtype), axes=("experts", *axes))
        zeros = nnx.Param(jnp.zeros((experts, out_size), dtype), axes=("experts", axes[0])) if bias else None
        self.bias: nnx.Variable | None = nnx.data(zeros)
        self.lora: LoRA | None = nnx.data(None)

    def projection(self) -> Projection:
        bias = None if self.bias is None else self.bias.get_value()
        return Projection(self.weight.get_value(), None if self.lora is None else self.lora.weights(), bias)


class Embedding(nnx.Module):
    """Rows of a [V, D] table."""

    def __init__(self, key: jax.Array, vocab: int, size: int, dtype: Any):
        self.weight: nnx.Variable = nnx.Param(normal(key, (vocab, size), dtype), axes=("vocab", "embed"))

    def __call__(self, tokens: jax.Array, dtype: Any) -> jax.Array:
        with jax.named_scope("embed"):
            return host.rows(self.weight.get_value(), tokens).astype(dtype)


def normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return (INIT_STD * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def fold(key: jax.Array | None, index: int | jax.Array) -> jax.Array | None:
    """A key of its own for each index, or none of none; of keys [A] of as many micro-batches, as many."""
    if key is None:
        return None
    return jax.vmap(jax.random.fold_in, (0, None))(key, index) if key.ndim else jax.random.fold_in(key, index)


def rotate(x: jax.Array, positions: jax.Array, rope: Rope, whole: bool = False) -> jax.Array:
    """Rotary positions, the halves of a head turned against each other as in Llama and Mixtral on the Hub.

    x: [B, T, H, C]; positions: int32 [B, T]. Angles in fp32. whole: no half of a head is an array (a TPU would fill it up to 128 numbers):
    they change places by a product, which is exact.
    """
    c = x.shape[-1]
    own = rope.scaling is None
    frequency = rope.theta ** (-jnp.arange(0, c, 2, dtype=jnp.float32) / c) if own else jnp.asarray(rope.frequencies(c))
    angle = positions[..., None].astype(jnp.float32) * frequency  # [B, T, C/2]
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    cos, sin = (cos, sin) if own else (cos * rope.scale, sin * rope.scale)
    if whole:
        exchange = jnp.roll(jnp.eye(c, dtype=x.dtype), c // 2, axis=1)
        other = jnp.einsum("bthc,cd->bthd", x, exchange, precision="highest").astype(jnp.float32)
        cos, sin = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
        return (x.astype(jnp.float32) * cos + other * sin).astype(x.dtype)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def stack_layers(make: Callable[[jax.Array], nnx.Module], key: jax.Array, layers: int) -> Any:
    """`layers` modules of one kind as one module whose every weight has a leading axis [L], named "layers"."""
    graphdef = nnx.split(nnx.eval_shape(lambda: make(key)))[0]
    state = jax.vmap(lambda k: nnx.split(make(k))[1])(jax.random.split(key, layers))
    stacked = nnx.merge(graphdef, state)
    for _, variable in nnx.to_flat_state(nnx.state(stacked)):
        variable.set_metadata("axes", ("layers", *variable.get_metadata("axes")))
    nnx.update(stacked, nnx.state(stacked))
    return stacked


class Stretch(NamedTuple):
    """Layers of a stack that one scan runs over: `layers` of them, from `first` on.

    layer: makes layer `index` of its slice of the stacked weights. in_place: they are a part of the stack, and a scan over their weights
    would copy them: it runs over numbers alone, and its body reads the weights where they lie.
    """

    first: int
    layers: int
    layer: Callable[[nnx.State, jax.Array], Any]
    in_place: bool = False


def scannable(stacked: nnx.Module) -> tuple[nnx.State, list[Stretch]]:
    """`stack_layers`' stacked weights, and the stretches of layers to scan over: one, or two where the first layers' experts are on the
    device and the others' in the host's memory.

    Frozen experts are not part of the weights: they stay whole, and a layer gets an `OfLayer` of them.
    """
    graphdef, state = nnx.split(stacked)
    flat = nnx.to_flat_state(state)
    experts = [(path, v) for path, v in flat if isinstance(v, Frozen) and of_experts(v)]
    others = nnx.from_flat_state([(path, v) for path, v in flat if not (isinstance(v, Frozen) and of_experts(v))])

    def stretch(number: int, first: int, layers: int) -> Stretch:
        held = [(path, v, list(pieces_of(v.get_value()))[number][1]) for path, v in experts]

        def layer(slice_: nnx.State, index: jax.Array) -> Any:
            own = [(path, v.replace(OfLayer(piece, index - first if first else index))) for path, v, piece in held]
            return nnx.merge(graphdef, nnx.from_flat_state([*nnx.to_flat_state(slice_), *own]))

        return Stretch(first, layers, layer, len(parts) > 1)

    parts = [(first, piece.shape[0]) for first, piece in pieces_of((experts or flat)[0][1].get_value())]
    return others, [stretch(number, *part) for number, part in enumerate(parts)]


def of_experts(variable: nnx.Variable) -> bool:
    """Whether it is a stack of expert matrices: [layers, experts, out, in]."""
    axes = variable.get_metadata("axes")
    return axes[:2] == ("layers", "experts") and len(axes) == 4


def rematerialized(body: Callable[..., Any], remat: str, *, apart: bool = False) -> Callable[..., Any]:
    """`none` keeps what autodiff keeps; `dots` the stream before each half of a layer, the routing, and what products computed (norms,
    activations and dequantization are done again); `full` the stream and the routing; `offload` the same, the stream in the host's memory,
    where the body names it. apart: XLA cannot take for the recomputation what the forward pass computed, nor do it before the body's own
    gradient is there, and hold it next to what is larger. Raises ValueError for another name."""
    if remat == "none":
        return body
    policies = jax.checkpoint_policies
    if remat == "offload":
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[*ROUTING_NAMES, *HALFWAY_NAMES[1:]], names_which_can_be_offloaded=[STREAM_NAME, HALFWAY_NAMES[0]],
            offload_src="device", offload_dst="pinned_host",
        )  # fmt: skip
        return jax.checkpoint(body, policy=policy, prevent_cse=apart)
    kept = {"dots": (*ROUTING_NAMES, *HALFWAY_NAMES, *DOT_NAMES), "full": (*ROUTING_NAMES, *HALFWAY_NAMES)}
    if remat not in kept:
        raise ValueError(f"remat = {remat!r}: expected one of {list(REMAT_POLICIES)}")
    return jax.checkpoint(body, policy=policies.save_only_these_names(*kept[remat]), prevent_cse=apart)
