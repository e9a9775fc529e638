"""Every token through the experts it chose: dropless, exact, with a gradient of its own.

`grouped_mlp` sorts token rows by expert, sends each group through its own expert's matrices, and adds the rows of one token up again.
`dense_matmul` is the other branch: all tokens through all experts, nothing to sort.

Backends do the middle part (`_BACKENDS`); `choose` says which, by what `choice` has of the device.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moejax.models.ops import choice
from moejax.models.ops.grouped import capacity, decode, loop, ragged
from moejax.models.ops.grouped.expert import LoRAWeights, Plan, Projection
from moejax.models.ops.linear import Weight, dequantized, with_frozen

__all__ = [
    "BACKENDS", "Groups", "LoRAWeights", "Plan", "Projection", "choose", "combine", "dense_matmul", "dispatch", "group", "grouped_mlp",
    "row_keys", "sort_weights",
]  # fmt: skip

_BACKENDS: dict[str, Any] = {"loop": loop, "capacity": capacity, "ragged": ragged, "decode": decode}
BACKENDS = (*_BACKENDS,)


def choose(
    backend: str,
    platform: str,
    tokens: int,
    experts: int,
    experts_per_token: int,
    *,
    hidden: int = 1024,
    intermediate: int = 1024,
    quantized: bool = False,
    item: int = 2,
    memory_bytes: int | None = None,
    dealt: bool = False,
) -> Plan:
    """The plan for this device and size. Raises ValueError for a backend that does not exist.

    platform: "cpu", "gpu", or a GPU's kind; item, memory_bytes, dealt: see `choice.grouped`.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"moe_backend = {backend!r}: expected one of {['auto', *BACKENDS]}")
    found, tile, small_tile, capacity = choice.grouped(
        platform, tokens, experts, experts_per_token, hidden=hidden, intermediate=intermediate, quantized=quantized, item=item,
        memory_bytes=memory_bytes, asked=backend, dealt=dealt,
    )  # fmt: skip
    return Plan(found, tile, small_tile, capacity=capacity)


class Groups(NamedTuple):
    """Where each (token, choice) stands after sorting by expert.

    choice: int32 [M], the choice n·K + k of each sorted row (N·K where the row is padding). position: int32 [N, K], the sorted row
    of each choice. sizes: int32 [E]. M = N·K + tile rows: the slack that the last tile may run into.
    """

    choice: jax.Array
    position: jax.Array
    sizes: jax.Array

    @property
    def token(self) -> jax.Array:
        """The token of each sorted row, N where it is padding."""
        return self.choice // self.position.shape[1]

    @property
    def number(self) -> jax.Array:
        """n·K + k of each sorted row's choice."""
        return self.choice

    @property
    def choices(self) -> int:
        """Their axis of position."""
        return 1


class ChoicesFirst(Groups):
    """The same of choices [K, N], as a TPU has them, which fills a last axis of K up to 128: choice is k·N + n, position [K, N]."""

    @property
    def choices(self) -> int:
        return 0

    @property
    def token(self) -> jax.Array:
        n = self.position.shape[1]
        return jnp.where(self.choice < self.position.size, self.choice % n, n)

    @property
    def number(self) -> jax.Array:
        k, n = self.position.shape
        return jnp.where(self.choice < self.position.size, self.choice % n * k + self.choice // n, self.position.size)


def group(experts: jax.Array, valid: jax.Array, num_experts: int, slack: int, *, first: bool = False) -> Groups:
    """Sort the choices by expert, stably. experts: int32 [N, K]; valid: bool [N] (padding tokens visit no expert). first: experts are
    [K, N]."""
    shape, size = experts.shape, experts.size
    flat = jnp.where(valid if first else valid[:, None], experts, num_experts).reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)  # [N·K], sorted row -> choice
    position = jnp.zeros(size, jnp.int32).at[order].set(jnp.arange(size, dtype=jnp.int32), unique_indices=True)
    sizes = jnp.sum(flat[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    rows = jnp.arange(size, dtype=jnp.int32)
    choice = jnp.where(rows < sizes.sum(), order, size)
    kind = ChoicesFirst if first else Groups
    return kind(jnp.pad(choice, (0, slack), constant_values=size), position.reshape(shape), sizes)


@jax.custom_vjp
def dispatch(x: jax.Array, groups: Groups) -> jax.Array:
    """Copy token rows to their sorted places: [N, D] -> [M, D]; padding rows are zero. Transpose of `combine`."""
    return jnp.take(x, groups.token, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def combine(y: jax.Array, groups: Groups) -> jax.Array:
    """Add up the rows of each token: [M, D] -> [N, D]. A gather, as is its transpose `dispatch`: no scatter-add anywhere."""
    return jnp.take(y, groups.position, axis=0, mode="clip").sum(axis=groups.choices)


dispatch.defvjp(lambda x, groups: (dispatch(x, groups), groups), lambda groups, g: (combine(g, groups), None))
combine.defvjp(lambda y, groups: (combine(y, groups), groups), lambda groups, g: (dispatch(g, groups), None))


@jax.custom_vjp
def sort_weights(weights: jax.Array, groups: Groups) -> jax.Array:
    """The routing weight of each sorted row: [N, K] (or as `position`) -> [M], zero on padding rows. A gather, as is its gradient."""
    return jnp.take(weights.reshape(-1), groups.choice, mode="fill", fill_value=0)


def _sort_weights_backward(groups: Groups, g: jax.Array) -> tuple[jax.Array, None]:
    live = groups.choice < groups.position.size
    return jnp.take(jnp.where(live, g, 0), groups.position, axis=0), None


sort_weights.defvjp(lambda weights, groups: (sort_weights(weights, groups), groups), _sort_weights_backward)


def row_keys(key: jax.Array | None, groups: Groups) -> jax.Array | None:
    """Of the dropout of each sorted row: uint32 [M, …], or none of none. key: one, or [A], of as many micro-batches that the tokens are of,
    one after the other. A choice has the key of its micro-batch and its own number in it, whatever stands next to it."""
    if key is None:
        return None
    of_micro_batch = groups.position.size // key.size
    micro = jnp.minimum(groups.number // of_micro_batch, key.size - 1)
    return jax.random.key_data(jax.vmap(jax.random.fold_in)(key.reshape(-1)[micro], groups.number % of_micro_batch))


def grouped_mlp(
    plan: Plan,
    x: jax.Array,
    row_weights: jax.Array,
    groups: Groups,
    inputs: tuple[Projection, ...],
    output: Projection,
    keys: jax.Array | None = None,
) -> jax.Array:
    """y[n] = Σ over n's sorted rows m of p[m] · W_out activation(W_1 x[n], …), every W that of row m's expert: W x = weight x +
    B (A dropout(x)) + bias.

    x: [N, I]; row_weights p: [M], by `sort_weights`; keys: of the adapters' dropout, by `row_keys`. Returns [N, O] in x's dtype. Gradients:
    x, row_weights, the adapters, and weights and biases if `plan.trainable`; a frozen weight is saved as the codes it is, and dequantized
    again in the backward pass. The weight p multiplies before W_out: the same sum, whose gradient needs no output row.
    """
    plan = plan if keys is not None else plan._replace(dropout=0.0)
    if plan.backend == "loop":
        kind = loop.ChoicesFirst if isinstance(groups, ChoicesFirst) else loop.Tokens
        tokens = kind(x, groups.token, groups.position)
        return _mlp(plan, tokens, row_weights, groups.sizes, inputs, output, keys)
    with jax.named_scope("dispatch"):
        rows = dispatch(x, groups)  # [M, I]
    y = _mlp(plan, rows, row_weights, groups.sizes, inputs, output, keys)
    with jax.named_scope("combine"):
        return combine(y, groups)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mlp(plan: Plan, *operands: Any) -> Any:
    return _BACKENDS[plan.backend].forward(plan, False, *operands)[0]


def _mlp_forward(plan: Plan, *operands: Any) -> Any:
    y, kept = _BACKENDS[plan.backend].forward(plan, plan.keep, *operands)
    return y, (operands, [checkpoint_name(rows, "hidden") for rows in kept])


def _mlp_backward(plan: Plan, residuals: Any, dy: jax.Array) -> Any:
    operands, kept = residuals
    dx, dp, (dws, dloras, dbs) = _BACKENDS[plan.backend].backward(plan, operands, kept, dy)
    _, _, _, inputs, output, _ = operands

    def gradient(projection: Projection, dw: jax.Array | None, dlora: LoRAWeights | None, db: jax.Array | None) -> Projection:
        if dlora is not None and projection.lora is not None:
            whole = LoRAWeights(dlora.a, dlora.b.swapaxes(1, 2))
            dlora = jax.tree.map(lambda g, w: g.astype(w.dtype), whole, projection.lora)
        dbias = None if db is None or projection.bias is None else db.astype(projection.bias.dtype)
        return Projection(None if dw is None else dw.astype(projection.weight.dtype), dlora, dbias)  # type: ignore[arg-type,union-attr]

    none = [None] * len(plan.names)
    *dinputs, doutput = map(gradient, (*inputs, output), dws or none, dloras, dbs or none)
    return dx, dp, None, tuple(dinputs), doutput, None


_mlp.defvjp(_mlp_forward, _mlp_backward)


def dense_matmul(product: str, x: jax.Array, weight: Weight, name: str, *, trainable: bool) -> jax.Array:
    """All tokens through all experts in one batched matmul. `product` is an einsum of (x, w), e.g. "nd,efd->enf"."""
    if trainable:
        return jnp.einsum(product, x, dequantized(weight, x.dtype, f"{name}_dequant"))
    return with_frozen(_Einsum(product), f"{name}_dequant", weight, x)


class _Einsum(NamedTuple):
    """A hashable einsum of (w, x): static argument of `with_frozen`."""

    product: str

    def __call__(self, w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.einsum(self.product, x, w)
