"""Some rows through one expert's matrices, forward and backward: the part that the grouped matmul's backends share.

What multiplies is `products`: the functions of `dot`, by one expert's matrices, or the same by those of each row's expert (`ragged`), whose
matrices, adapters and gradients have the experts for a first axis.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.models.ops.grouped import dot
from moejax.models.ops.linear import Weight


class Plan(NamedTuple):
    """Static choices of one grouped MLP.

    backend, tile, small_tile: `loop`'s products have this many rows, and those for what is left of a group; capacity: rows of each
    expert in `capacity`'s batch; activation: the hidden row from the rows of the input projections;
    names: the profile's scopes of the projections, output last; trainable: the weights want gradients too; keep: hidden rows are
    saved for the backward pass, not computed again; dropout: of the adapters' inputs, active with a key; prefetch: weights in the host's
    memory come by the "layer", an expert ahead of its products ("experts"), or as they are used ("").
    """

    backend: str
    tile: int
    small_tile: int
    activation: Callable[..., jax.Array] = operator.mul
    names: tuple[str, ...] = ("w1", "w3", "w2")
    trainable: bool = False
    keep: bool = False
    dropout: float = 0.0
    capacity: int = 0
    prefetch: str = ""


class LoRAWeights(NamedTuple):
    """One adapter pair per expert; the scale alpha/rank is already in `b`. a: [E, R, I], None: that of the projection before it, which
    reads the same rows; b: [E, O, R]."""

    a: jax.Array | None
    b: jax.Array


class Projection(NamedTuple):
    """One matrix per expert, [E, O, I], an array or in 4 bits; its adapters; and its biases [E, O]."""

    weight: Weight
    lora: LoRAWeights | None = None
    bias: jax.Array | None = None


Pairs = tuple[LoRAWeights | None, ...]


class Beside(NamedTuple):
    """Of all projections, output last, what is small next to their matrices: adapters and biases."""

    pairs: Pairs
    biases: tuple[jax.Array | None, ...]


class Gradients(NamedTuple):
    """What a tile adds to the gradients of an expert's weights and biases (None: not trained) and adapters, output last. fp32."""

    weights: list[jax.Array] | None
    adapters: list[LoRAWeights | None]
    biases: list[jax.Array | None] | None = None


def beside(inputs: Sequence[Projection], output: Projection, dtype: Any) -> Beside:
    """In the dtype of the rows: an expert's is then cut out of them as it is used."""
    every = (*inputs, output)
    found: Beside = jax.tree.map(lambda a: a.astype(dtype), Beside(tuple(p.lora for p in every), tuple(p.bias for p in every)))
    return found


class Adapters:
    """One expert's adapters on projections that read the same rows. Without dropout one product serves them all: `A` side by side.

    a: by the projection that has it; b: by projection; users: of each A. first: the number of the first projection, for dropout's masks.
    """

    def __init__(self, plan: Plan, pairs: Pairs, first: int = 0, products: Any = dot):
        self.products = products
        self.a: dict[int, jax.Array] = {}
        self.b: dict[int, jax.Array] = {}
        self.users: dict[int, list[int]] = {}
        for i, pair in enumerate(pairs):
            if pair is None:
                continue
            self.b[i] = pair.b
            if pair.a is not None:
                owner, self.a[i] = i, pair.a
            self.users.setdefault(owner, []).append(i)
        self.count = len(pairs)
        self.keep, self.first = 1.0 - plan.dropout, first
        self.groups = [[i] for i in self.a] if plan.dropout else [list(self.a)] * bool(self.a)

    def _joined(self, members: list[int]) -> jax.Array:
        return jnp.concatenate([self.a[i] for i in members], axis=-2)  # [ΣR, I]

    def _split(self, x: jax.Array, members: list[int], axis: int) -> list[jax.Array]:
        return jnp.split(x, np.cumsum([self.a[i].shape[-2] for i in members])[:-1].tolist(), axis=axis)

    def _dropped(self, x: jax.Array, member: int, keys: jax.Array | None) -> jax.Array:
        """A row's mask is of its own key: the same in both passes, in any tile and order."""
        if keys is None:
            return x

        def mask(key: jax.Array) -> jax.Array:
            return jax.random.bernoulli(jax.random.fold_in(key, self.first + member), self.keep, x.shape[1:])

        keep = jax.vmap(mask)(jax.random.wrap_key_data(keys))
        return jnp.where(keep, x / self.keep, jnp.zeros((), x.dtype))

    def down(self, x: jax.Array, keys: jax.Array | None) -> dict[int, jax.Array]:
        """A dropout(x) of each adapter: [t, I] -> {projection: [t, R]}."""
        low: dict[int, jax.Array] = {}
        with jax.named_scope("lora"):
            for members in self.groups:
                product = self.products.forward(self._dropped(x, members[0], keys), self._joined(members))
                for owner, rows in zip(members, self._split(product, members, 1), strict=True):
                    low |= dict.fromkeys(self.users[owner], rows)
        return low

    def up(self, y: jax.Array, low: dict[int, jax.Array], member: int) -> jax.Array:
        """y + B low, for one projection."""
        if member not in low:
            return y
        with jax.named_scope("lora"):
            return y + self.products.forward(low[member], self.b[member])

    def zeros(self) -> list[LoRAWeights | None]:
        """Sums of the gradients, fp32. B's is summed up transposed, [R, O]: the product that compilers do well."""
        sums: list[LoRAWeights | None] = [None] * self.count
        for i, b in self.b.items():
            a = self.a.get(i)
            sums[i] = LoRAWeights(None if a is None else jnp.zeros(a.shape), jnp.zeros(b.shape[::-1]))
        return sums

    def backward(
        self, x: jax.Array, low: dict[int, jax.Array], dys: Sequence[jax.Array], keys: jax.Array | None
    ) -> tuple[jax.Array, list[LoRAWeights | None]]:
        """dx, and dA = dLᵀ dropout(x), dB = dYᵀ L as `zeros` has them, where dL = dY B, summed over the projections that use the A."""
        dx = jnp.zeros((), x.dtype)
        gradients: list[LoRAWeights | None] = [None] * self.count
        with jax.named_scope("lora"):
            for members in self.groups:
                dropped, a = self._dropped(x, members[0], keys), self._joined(members)
                through = [[self.products.backward(dys[i], self.b[i]) for i in self.users[owner]] for owner in members]
                dlow = jnp.concatenate([reduce(jnp.add, parts) for parts in through], axis=1)
                das = self._split(self.products.gradient(dlow, dropped), members, -2)
                for owner, da in zip(members, das, strict=True):
                    for i in self.users[owner]:
                        db = self.products.gradient(low[i], dys[i])
                        gradients[i] = LoRAWeights(da if i == owner else None, db)
                dx = dx + self._dropped(self.products.backward(dlow, a), members[0], keys)
        return dx, gradients


class Expert:
    """One expert's matrices (`ws`, `w_out`), adapters and biases, in the dtype of the rows, and what they do to a tile of them [t, I].

    `keys` in the methods: of the rows, for dropout's masks, [t, …] (None: nothing is dropped); `p`: the rows' routing weights [t].
    """

    def __init__(self, plan: Plan, matrices: Sequence[jax.Array], others: Beside, products: Any = dot):
        *self.ws, self.w_out = matrices
        *self.biases, self.bias_out = others.biases
        self.plan, self.products, pairs = plan, products, others.pairs
        self.adapters = Adapters(plan, pairs[:-1], products=products)
        self.adapters_out = Adapters(plan, pairs[-1:], len(self.ws), products)

    def _hidden(self, rows: jax.Array, keys: jax.Array | None) -> tuple[list[jax.Array], dict[int, jax.Array]]:
        """The input projections of a tile, and the low-rank rows on the way."""
        low = self.adapters.down(rows, keys)
        hidden = []
        for i, w in enumerate(self.ws):
            with jax.named_scope(self.plan.names[i]):
                y = self.adapters.up(self.products.forward(rows, w), low, i)
                bias = self.biases[i]
                hidden.append(y if bias is None else y + bias)
        return hidden, low

    def _activated(self, hidden: list[jax.Array], p: jax.Array) -> jax.Array:
        with jax.named_scope("act"):
            return self.plan.activation(*hidden) * p[:, None]

    def forward(self, rows: jax.Array, p: jax.Array, keys: jax.Array | None) -> tuple[jax.Array, list[jax.Array]]:
        """The output rows [t, O], and the hidden rows, one array for each input projection."""
        hidden, _ = self._hidden(rows, keys)
        act = self._activated(hidden, p)
        with jax.named_scope(self.plan.names[-1]):
            y = self.adapters_out.up(self.products.forward(act, self.w_out), self.adapters_out.down(act, keys), 0)
            y = y if self.bias_out is None else y + p[:, None] * self.bias_out
        return y, hidden

    def backward(
        self, rows: jax.Array, p: jax.Array, dy: jax.Array, keys: jax.Array | None, hidden: list[jax.Array] | None
    ) -> tuple[jax.Array, jax.Array, Gradients]:
        """dx = dH W of every projection, dp, and the sums. dy: zero on rows that are not the expert's; hidden: None computes them again."""
        names = self.plan.names
        if hidden is not None:
            low = self.adapters.down(rows, keys)
        else:
            with jax.named_scope("rematted_computation"):
                hidden, low = self._hidden(rows, keys)
        act, pull = jax.vjp(self._activated, hidden, p)
        with jax.named_scope(names[-1]):
            dact = self.products.backward(dy, self.w_out)
            through, out_gradients = self.adapters_out.backward(act, self.adapters_out.down(act, keys), [dy], keys)
        dhidden, dp = pull(dact + through)
        if self.bias_out is not None:
            dp = dp + self.products.with_bias(dy, self.bias_out)
        dx, gradients = self.adapters.backward(rows, low, dhidden, keys)
        for i, (w, dh) in enumerate(zip(self.ws, dhidden, strict=True)):
            with jax.named_scope(names[i]):
                dx = dx + self.products.backward(dh, w)
        dws = dbs = None
        if self.plan.trainable:
            with jax.named_scope("dw"):
                pairs = [*((dh, rows) for dh in dhidden), (dy, act)]
                dws = [self.products.gradient(g, r) for g, r in pairs]
                sums = [*((dh, jnp.ones_like(p)) for dh in dhidden), (dy, p)]
                dbs = [self.products.bias_gradient(g, by) if there else None for (g, by), there in zip(sums, self._biased, strict=True)]
        return dx, dp, Gradients(dws, [*gradients, *out_gradients], dbs)

    def zeros(self) -> Gradients:
        """Sums of no tile."""
        dws = dbs = None
        if self.plan.trainable:
            ws = (*self.ws, self.w_out)
            dws = [jnp.zeros(w.shape, jnp.float32) for w in ws]
            dbs = [jnp.zeros(w.shape[:1], jnp.float32) if there else None for w, there in zip(ws, self._biased, strict=True)]
        return Gradients(dws, [*self.adapters.zeros(), *self.adapters_out.zeros()], dbs)

    @property
    def _biased(self) -> list[bool]:
        return [b is not None for b in (*self.biases, self.bias_out)]


def weights_of(inputs: Sequence[Projection], output: Projection) -> list[Weight]:
    """The weights of all projections, output last."""
    return [p.weight for p in (*inputs, output)]


def matrices(plan: Plan, weights: Sequence[Weight], dtype: Any, e: jax.Array | None = None) -> list[jax.Array]:
    """Expert e's matrices (None: all experts', [E, O, I]) of `weights_of` in `dtype`; the dequantization under its scope."""
    return [dot.operand(w, e, dtype, f"{name}_dequant") for name, w in zip(plan.names, weights, strict=True)]
