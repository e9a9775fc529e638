"""Every token through the experts it chose: dropless, exact, with a gradient of its own.

`dispatch` sorts token rows by expert, `grouped_mlp` sends each group through its own expert's matrices, `combine` adds the rows of
one token up again. `dense_matmul` is the other branch: all tokens through all experts, nothing to sort.

The portable backend is a *loop* over experts: dequantize one expert's matrices, then send its group through all of them, tile by
tile. The hidden activations [M, F] never exist as a whole: the backward pass computes a tile's again (or reads them, if the plan
says `keep`). Rows are sorted, so a tile that runs over the end of its group only writes rows that the next group overwrites: no
mask, no copy, no token dropped for any routing; the price is half a small tile of padding per expert. `jax.lax.ragged_dot` is not
used: XLA expands it to the dense product, 8 times the useful FLOPs at 1 of 8 experts.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from models.ops.linear import Weight, dequantized, out_size, part, with_frozen

BACKENDS = ("loop",)


class Plan(NamedTuple):
    """Static choices of one grouped MLP. `tile`, `small_tile`: rows of one product, and of one for what is left of a group;
    `activation`: the hidden row from the rows of the input projections; `names`: the profile's scopes of the projections, output
    last; `trainable`: the weights want gradients too; `keep`: hidden rows are saved for the backward pass, not computed again;
    `dropout`: of the adapters' inputs, active with a key."""

    backend: str
    tile: int
    small_tile: int
    activation: Callable[..., jax.Array] = operator.mul
    names: tuple[str, ...] = ("w1", "w3", "w2")
    trainable: bool = False
    keep: bool = False
    dropout: float = 0.0


class Groups(NamedTuple):
    """Where each (token, choice) stands after sorting by expert.

    token: int32 [M], the token of each sorted row (N where the row is padding). position: int32 [N, K], the sorted row of each
    choice. sizes: int32 [E]. M = N·K + tile rows: the slack that the last tile may run into.
    """

    token: jax.Array
    position: jax.Array
    sizes: jax.Array


class LoRAWeights(NamedTuple):
    """One adapter pair per expert; the scale alpha/rank is already in `b`. a: [E, R, I]; b: [E, O, R]."""

    a: jax.Array
    b: jax.Array


class Projection(NamedTuple):
    """One matrix per expert, [E, O, I], an array or NF4; and its adapters."""

    weight: Weight
    lora: LoRAWeights | None = None


def choose(backend: str, platform: str, tokens: int, experts: int, experts_per_token: int) -> Plan:
    """The backend and its tile for this platform and size. Raises ValueError for a backend that does not exist.

    Large tiles of at most half the mean group; small ones for the rest of a group, so that padding stays at a few percent. 128 and
    32 rows measured best on two CPU cores; a GPU wants larger ones (fewer launches).
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"moe_backend = {backend!r}: expected one of {['auto', *BACKENDS]}")
    mean_group = max(1, tokens * experts_per_token // experts)
    largest, smallest = (128, 32) if platform == "cpu" else (512, 64)
    tile = min(largest, max(8, _power_of_two(mean_group // 2)))
    return Plan("loop", tile, min(tile, smallest))


def _power_of_two(n: int) -> int:
    """The largest power of two that is at most n (1 for n < 1)."""
    return 1 << max(n, 1).bit_length() - 1


def group(experts: jax.Array, valid: jax.Array, num_experts: int, slack: int) -> Groups:
    """Sort the choices by expert, stably. experts: int32 [N, K]; valid: bool [N] (padding tokens visit no expert)."""
    n, k = experts.shape
    flat = jnp.where(valid[:, None], experts, num_experts).reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)  # [N·K], sorted row -> choice
    position = jnp.zeros(n * k, jnp.int32).at[order].set(jnp.arange(n * k, dtype=jnp.int32), unique_indices=True)
    sizes = jnp.sum(flat[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    rows = jnp.arange(n * k, dtype=jnp.int32)
    token = jnp.where(rows < sizes.sum(), order // k, n)
    return Groups(jnp.pad(token, (0, slack), constant_values=n), position.reshape(n, k), sizes)


@jax.custom_vjp
def dispatch(x: jax.Array, groups: Groups) -> jax.Array:
    """Copy token rows to their sorted places: [N, D] -> [M, D]; padding rows are zero. Transpose of `combine`."""
    return jnp.take(x, groups.token, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def combine(y: jax.Array, groups: Groups) -> jax.Array:
    """Add up the rows of each token: [M, D] -> [N, D]. A gather, as is its transpose `dispatch`: no scatter-add anywhere."""
    return jnp.take(y, groups.position, axis=0, mode="clip").sum(axis=1)


dispatch.defvjp(lambda x, groups: (dispatch(x, groups), groups), lambda groups, g: (combine(g, groups), None))
combine.defvjp(lambda y, groups: (combine(y, groups), groups), lambda groups, g: (dispatch(g, groups), None))


@jax.custom_vjp
def sort_weights(weights: jax.Array, groups: Groups) -> jax.Array:
    """The routing weight of each sorted row: [N, K] -> [M], zero on padding rows. Its gradient is a gather too."""
    sorted_weights = jnp.zeros(groups.token.shape, weights.dtype)
    sorted_weights = sorted_weights.at[groups.position.reshape(-1)].set(weights.reshape(-1), unique_indices=True)
    return jnp.where(groups.token < weights.shape[0], sorted_weights, 0)


def _sort_weights_backward(groups: Groups, g: jax.Array) -> tuple[jax.Array, None]:
    live = groups.token < groups.position.shape[0]
    return jnp.take(jnp.where(live, g, 0), groups.position, axis=0), None


sort_weights.defvjp(lambda weights, groups: (sort_weights(weights, groups), groups), _sort_weights_backward)


def grouped_mlp(
    plan: Plan,
    x: jax.Array,
    row_weights: jax.Array,
    sizes: jax.Array,
    inputs: tuple[Projection, ...],
    output: Projection,
    key: jax.Array | None = None,
) -> jax.Array:
    """y[m] = W_out (p[m] · activation(W_1 x[m], …)), every W that of row m's expert: W x = weight x + B (A dropout(x)).

    x: [M, I] as `dispatch` sorts it; row_weights p: [M]; sizes: int32 [E]; key: of the adapters' dropout. Returns [M, O] in x's
    dtype. Gradients: x, row_weights, the adapters, and the weights if `plan.trainable`; a frozen weight is saved as the codes it
    is, and dequantized again in the backward pass. The weight p multiplies before W_out: the same sum, and its gradient needs no
    output row.
    """
    return _mlp(plan, x, row_weights, sizes, inputs, output, key)


def _rows(array, row, count):  # type: ignore[no-untyped-def]
    return jax.lax.dynamic_slice_in_dim(array, row, count)


def _put(array, rows, row):  # type: ignore[no-untyped-def]
    return jax.lax.dynamic_update_slice_in_dim(array, rows, row, 0)


def _over_tiles(plan, start, size, body, state):  # type: ignore[no-untyped-def]
    """body(row, first, count, state) for each tile of a group: large tiles while they fit, then small ones for the rest.

    `first`: the number of the group's rows before the tile. Large tiles read the weights less often, small ones pad less.
    """
    whole = size // plan.tile

    def tiles(count, offset):  # type: ignore[no-untyped-def]
        return lambda i, state: body(start + offset + i * count, offset + i * count, count, state)

    with jax.named_scope("tiles"):
        state = jax.lax.fori_loop(0, whole, tiles(plan.tile, 0), state)
    rest = size - whole * plan.tile
    with jax.named_scope("small_tiles"):
        return jax.lax.fori_loop(0, -(-rest // plan.small_tile), tiles(plan.small_tile, whole * plan.tile), state)


def _matrices(plan, inputs, output, e, dtype):  # type: ignore[no-untyped-def]
    """Expert e's matrices, dequantized, output last."""
    projections = (*inputs, output)
    return [dequantized(part(p.weight, e), dtype, f"{name}_dequant") for name, p in zip(plan.names, projections, strict=True)]


def _over_experts(body, state, sizes, inputs, output):  # type: ignore[no-untyped-def]
    """Scan with xs = (expert, first row, rows, its adapters on the inputs, on the output). Weights are sliced inside, where used."""
    pairs = tuple(p.lora for p in inputs), output.lora
    return jax.lax.scan(body, state, (jnp.arange(sizes.shape[0]), jnp.cumsum(sizes) - sizes, sizes, *pairs))


class _Adapters:
    """One expert's adapters on projections that read the same rows. Without dropout one product serves them all: `A` side by side."""

    def __init__(self, plan: Plan, pairs: tuple[LoRAWeights | None, ...], key: jax.Array | None, dtype: Any):
        self.pairs = {i: LoRAWeights(*(w.astype(dtype) for w in p)) for i, p in enumerate(pairs) if p is not None}
        self.count = len(pairs)
        self.keep, self.key = 1.0 - plan.dropout, key if plan.dropout else None
        self.groups = [[i] for i in self.pairs] if self.key is not None else [list(self.pairs)] * bool(self.pairs)

    def _a(self, members: list[int]) -> jax.Array:
        return jnp.concatenate([self.pairs[i].a for i in members])  # [ΣR, I]

    def _split(self, x: jax.Array, members: list[int], axis: int) -> list[jax.Array]:
        return jnp.split(x, np.cumsum([self.pairs[i].a.shape[0] for i in members])[:-1].tolist(), axis=axis)

    def _dropped(self, x: jax.Array, member: int, row: jax.Array) -> jax.Array:
        """The same mask for the same rows in the forward and the backward pass: `row` is the first one's number."""
        if self.key is None:
            return x
        keep = jax.random.bernoulli(jax.random.fold_in(jax.random.fold_in(self.key, member), row), self.keep, x.shape)
        return jnp.where(keep, x / self.keep, jnp.zeros((), x.dtype))

    def down(self, x: jax.Array, row: jax.Array) -> dict[int, jax.Array]:
        """A dropout(x) of each adapter: [t, I] -> {projection: [t, R]}."""
        low: dict[int, jax.Array] = {}
        with jax.named_scope("lora"):
            for members in self.groups:
                product = jnp.einsum("ti,ri->tr", self._dropped(x, members[0], row), self._a(members))
                low.update(zip(members, self._split(product, members, 1), strict=True))
        return low

    def up(self, y: jax.Array, low: dict[int, jax.Array], member: int) -> jax.Array:
        """y + B low, for one projection."""
        if member not in low:
            return y
        with jax.named_scope("lora"):
            return y + jnp.einsum("tr,or->to", low[member], self.pairs[member].b)

    def zeros(self) -> list[LoRAWeights | None]:
        """Sums of the gradients, fp32. B's is summed up transposed, [R, O]: the product that compilers do well."""
        sums: list[LoRAWeights | None] = [None] * self.count
        for i, (a, b) in self.pairs.items():
            sums[i] = LoRAWeights(jnp.zeros(a.shape), jnp.zeros(b.shape[::-1]))
        return sums

    def backward(self, x: jax.Array, low: dict[int, jax.Array], dys: list[jax.Array], row: jax.Array, sums: Any) -> Any:
        """dx, and the sums with this tile's dA = dLᵀ dropout(x), dB = dYᵀ L added, where dL = dY B."""
        dx, sums = jnp.zeros((), x.dtype), list(sums)
        with jax.named_scope("lora"):
            for members in self.groups:
                dropped, a = self._dropped(x, members[0], row), self._a(members)
                dlow = jnp.concatenate([jnp.einsum("to,or->tr", dys[i], self.pairs[i].b) for i in members], axis=1)
                das = self._split(jnp.einsum("tr,ti->ri", dlow, dropped, preferred_element_type=jnp.float32), members, 0)
                for i, da in zip(members, das, strict=True):
                    db = jnp.einsum("tr,to->ro", low[i], dys[i], preferred_element_type=jnp.float32)
                    sums[i] = LoRAWeights(sums[i].a + da, sums[i].b + db)
                dx = dx + self._dropped(jnp.einsum("tr,ri->ti", dlow, a), members[0], row)
        return dx, sums


def _expert(plan, inputs, output, key, dtype, xs):  # type: ignore[no-untyped-def]
    """What both passes need of one expert: first row, rows, input matrices, output matrix, and the adapters on either."""
    e, start, size, pairs, pair_out = xs
    *ws, w_out = _matrices(plan, inputs, output, e, dtype)
    key_out = None if key is None else jax.random.fold_in(key, len(plan.names))
    return start, size, ws, w_out, _Adapters(plan, pairs, key, dtype), _Adapters(plan, (pair_out,), key_out, dtype)


def _hidden(plan, ws, adapters, rows, row):  # type: ignore[no-untyped-def]
    """The input projections of a tile, and the low-rank rows on the way."""
    low = adapters.down(rows, row)
    hidden = []
    for i, w in enumerate(ws):
        with jax.named_scope(plan.names[i]):
            hidden.append(adapters.up(jnp.einsum("ti,oi->to", rows, w), low, i))
    return hidden, low


def _activated(plan, hidden, row_weights):  # type: ignore[no-untyped-def]
    with jax.named_scope("act"):
        return plan.activation(*hidden) * row_weights[:, None]


def _run(plan, keep, x, row_weights, sizes, inputs, output, key):  # type: ignore[no-untyped-def]
    """The output rows, and the hidden rows if `keep`."""

    def expert(state, xs):  # type: ignore[no-untyped-def]
        start, size, ws, w_out, adapters, adapters_out = _expert(plan, inputs, output, key, x.dtype, xs)

        def tile(row, _, count, state):  # type: ignore[no-untyped-def]
            y, kept = state
            hidden, _ = _hidden(plan, ws, adapters, _rows(x, row, count), row)
            act = _activated(plan, hidden, _rows(row_weights, row, count))
            with jax.named_scope(plan.names[-1]):
                part = adapters_out.up(jnp.einsum("ti,oi->to", act, w_out), adapters_out.down(act, row), 0)
            return _put(y, part, row), [_put(k, h, row) for k, h in zip(kept, hidden, strict=True)] if keep else kept

        return _over_tiles(plan, start, size, tile, state), None

    def empty(projection):  # type: ignore[no-untyped-def]
        return jnp.zeros((x.shape[0], out_size(projection.weight)), x.dtype)

    state = (empty(output), [empty(p) for p in inputs] if keep else [])
    return _over_experts(expert, state, sizes, inputs, output)[0]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mlp(plan, x, row_weights, sizes, inputs, output, key):  # type: ignore[no-untyped-def]
    return _run(plan, False, x, row_weights, sizes, inputs, output, key)[0]


def _mlp_forward(plan, *operands):  # type: ignore[no-untyped-def]
    y, kept = _run(plan, plan.keep, *operands)
    return y, (operands, [checkpoint_name(rows, "hidden") for rows in kept])


def _mlp_backward(plan, residuals, dy):  # type: ignore[no-untyped-def]
    """Per expert and tile: the hidden rows again, then dX = dH W of every projection, and the sums dA, dB (and dW), in fp32."""
    (x, row_weights, sizes, inputs, output, key), kept = residuals

    def expert(state, xs):  # type: ignore[no-untyped-def]
        start, size, ws, w_out, adapters, adapters_out = _expert(plan, inputs, output, key, x.dtype, xs)

        def tile(row, first, count, state):  # type: ignore[no-untyped-def]
            (dx, dp), (dws, sums, sums_out) = state
            rows = _rows(x, row, count)
            if plan.keep:
                hidden, low = [_rows(k, row, count) for k in kept], adapters.down(rows, row)
            else:
                with jax.named_scope("rematted_computation"):
                    hidden, low = _hidden(plan, ws, adapters, rows, row)
            act, pull = jax.vjp(lambda h, p: _activated(plan, h, p), hidden, _rows(row_weights, row, count))
            inside = (first + jnp.arange(count) < size)[:, None]
            dy_rows = jnp.where(inside, _rows(dy, row, count), jnp.zeros((), dy.dtype))
            with jax.named_scope(plan.names[-1]):
                dact = jnp.einsum("to,oi->ti", dy_rows, w_out)
                through, sums_out = adapters_out.backward(act, adapters_out.down(act, row), [dy_rows], row, sums_out)
            dhidden, dp_rows = pull(dact + through)
            dx_rows, sums = adapters.backward(rows, low, dhidden, row, sums)
            for i, (w, dh) in enumerate(zip(ws, dhidden, strict=True)):
                with jax.named_scope(plan.names[i]):
                    dx_rows = dx_rows + jnp.einsum("to,oi->ti", dh, w)
            if plan.trainable:
                pairs = [*((dh, rows) for dh in dhidden), (dy_rows, act)]
                with jax.named_scope("dw"):
                    parts = [jnp.einsum("to,ti->oi", g, r, preferred_element_type=jnp.float32) for g, r in pairs]
                dws = jax.tree.map(jnp.add, dws, parts)
            return (_put(dx, dx_rows, row), _put(dp, dp_rows, row)), (dws, sums, sums_out)

        dws = [jnp.zeros(w.shape, jnp.float32) for w in (*ws, w_out)] if plan.trainable else None
        return _over_tiles(plan, start, size, tile, (state, (dws, adapters.zeros(), adapters_out.zeros())))

    zeros = (jnp.zeros_like(x), jnp.zeros_like(row_weights))
    (dx, dp), (dws, sums, sums_out) = _over_experts(expert, zeros, sizes, inputs, output)

    def gradient(projection, dw, dlora):  # type: ignore[no-untyped-def]
        if dlora is not None:
            a, b = projection.lora
            dlora = LoRAWeights(dlora.a.astype(a.dtype), dlora.b.swapaxes(1, 2).astype(b.dtype))
        return Projection(None if dw is None else dw.astype(projection.weight.dtype), dlora)  # type: ignore[arg-type]

    dws = dws or [None] * len(plan.names)
    *dinputs, doutput = map(gradient, (*inputs, output), dws, (*sums, *sums_out))
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
