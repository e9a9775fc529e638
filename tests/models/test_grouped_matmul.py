"""The dropless grouped matmul: exact for every routing, in values and gradients, and no FLOP too many."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.ops import grouped_matmul as gm
from models.ops import nf4
from moejax.profiling.hlo import dot_flops

E, D, F, N, K, R = 8, 32, 48, 40, 2, 4

ROUTINGS = {
    "random": lambda rng: np.stack([rng.permutation(E)[:K] for _ in range(N)]),
    "all to two experts": lambda rng: np.tile([5, 2], (N, 1)),
    "first experts empty": lambda rng: np.stack([4 + rng.permutation(4)[:K] for _ in range(N)]),
    "last experts empty": lambda rng: np.stack([rng.permutation(3)[:K] for _ in range(N)]),
    "one token each": lambda rng: np.stack([[i % E, (i + 1) % E] for i in range(N)]),
}


def reference(x, w, experts, valid, weights, lora, lora_x):
    """Every choice by itself: y[n] = Σ_k p[n, k] (W[e] x[n] + B[e] A[e] lora_x[n])."""
    products = jnp.einsum("nd,efd->nef", x, w) + jnp.einsum("nd,erd,efr->nef", lora_x, lora.a, lora.b)
    picked = jnp.take_along_axis(products, experts[..., None], axis=1)
    return jnp.sum(picked * weights[..., None], axis=1) * valid[:, None]


def ours(x, w, experts, valid, weights, lora, lora_x, plan):
    groups = gm.group(experts, valid, E, plan.tile)
    rows, lora_rows = gm.dispatch(x, groups), None if lora_x is x else gm.dispatch(lora_x, groups)
    y = gm.grouped_matmul(rows, w, groups.sizes, plan, lora, lora_rows)
    return gm.combine(y * gm.sort_weights(weights, groups)[:, None], groups)


@pytest.mark.parametrize("padding", [0, 13])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_values_and_gradients(routing, padding):
    rng = np.random.default_rng(0)
    experts = jnp.asarray(ROUTINGS[routing](rng), jnp.int32)
    valid = jnp.arange(N) < N - padding
    x, lora_x, cotangent = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((N, D), (N, D), (N, F)))
    w = jnp.asarray(rng.normal(size=(E, F, D)), jnp.float32)
    lora = gm.LoRAWeights(
        jnp.asarray(rng.normal(size=(E, R, D)), jnp.float32), jnp.asarray(rng.normal(size=(E, F, R)), jnp.float32)
    )
    weights = jnp.asarray(rng.uniform(size=(N, K)), jnp.float32)
    plan = gm.Plan("loop", tile=16, small_tile=4, trainable=True)

    def loss(function, x, w, weights, lora, lora_x):
        return jnp.sum(function(x, w, experts, valid, weights, lora, lora_x) * cotangent)

    arguments = (x, w, weights, lora, lora_x)
    expected = jax.value_and_grad(partial(loss, reference), argnums=range(5))(*arguments)
    found = jax.jit(jax.value_and_grad(partial(loss, partial(ours, plan=plan)), argnums=range(5)))(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)


def test_frozen_nf4_weight_and_shared_lora_input():
    rng = np.random.default_rng(1)
    experts = jnp.asarray(ROUTINGS["random"](rng), jnp.int32)
    valid = jnp.ones(N, bool)
    x = jnp.asarray(rng.normal(size=(N, D)), jnp.float32)
    codes = nf4.quantize(jnp.asarray(rng.normal(size=(E, F, D)), jnp.float32), batch_axes=1)
    lora = gm.LoRAWeights(
        jnp.asarray(rng.normal(size=(E, R, D)), jnp.float32), jnp.asarray(rng.normal(size=(E, F, R)), jnp.float32)
    )
    weights = jnp.asarray(rng.uniform(size=(N, K)), jnp.float32)
    plan = gm.Plan("loop", tile=16, small_tile=4)

    def our_loss(x, lora):
        return jnp.sum(ours(x, codes, experts, valid, weights, lora, x, plan) ** 2)

    def expected_loss(x, lora):
        return jnp.sum(reference(x, nf4.dequantize(codes), experts, valid, weights, lora, x) ** 2)

    found, expected = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(x, lora) for f in (our_loss, expected_loss))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-2), found, expected)


def test_bfloat16_is_close_to_float32():
    rng = np.random.default_rng(2)
    experts, valid = jnp.asarray(ROUTINGS["random"](rng), jnp.int32), jnp.ones(N, bool)
    x, w = jnp.asarray(rng.normal(size=(N, D)), jnp.float32), jnp.asarray(rng.normal(size=(E, F, D)), jnp.float32)
    plan, weights = gm.Plan("loop", tile=16, small_tile=4), jnp.ones((N, K))

    def run(dtype):
        groups = gm.group(experts, valid, E, plan.tile)
        y = gm.grouped_matmul(gm.dispatch(x.astype(dtype), groups), w.astype(dtype), groups.sizes, plan)
        return np.asarray(gm.combine(y * gm.sort_weights(weights, groups)[:, None].astype(dtype), groups), np.float32)

    exact = run(jnp.float32)
    assert np.abs(run(jnp.bfloat16) - exact).max() < 0.02 * np.abs(exact).max()


class TestFlops:
    """At E = 8, k = 2, 4096 tokens: the bars of the design, from the compiled module and the trip counts of a random routing."""

    tokens, d, f = 4096, 64, 96

    def compiled(self, k):
        rng = np.random.default_rng(0)
        experts = jnp.asarray(np.stack([rng.permutation(E)[:k] for _ in range(self.tokens)]), jnp.int32)
        x, w = jnp.ones((self.tokens, self.d)), jnp.ones((E, self.f, self.d))
        plan = gm.choose("auto", "cpu", self.tokens, E, k)

        def forward(x):
            if k == E:
                return gm.dense_matmul("nd,efd->enf", x, w, "w1", trainable=False)
            groups = gm.group(experts, jnp.ones(self.tokens, bool), E, plan.tile)
            return gm.grouped_matmul(gm.dispatch(x, groups), w, groups.sizes, plan)

        def backward(x, dy):
            return jax.vjp(forward, x)[1](dy)[0]

        y = jax.eval_shape(forward, x)
        texts = [jax.jit(forward).lower(x).compile().as_text(), jax.jit(backward).lower(x, y).compile().as_text()]
        sizes = np.bincount(np.asarray(experts).reshape(-1), minlength=E)
        mean_tiles = np.mean(-(-sizes // plan.tile))
        return [dot_flops(text, lambda _: mean_tiles) for text in texts]

    def test_sparse_costs_at_most_1_4_times_the_useful(self):
        useful = 2 * self.tokens * 2 * self.d * self.f
        for flops in self.compiled(2):
            assert useful <= flops <= 1.4 * useful, flops / useful

    def test_dense_costs_exactly_4_times_the_sparse_useful(self):
        useful = 2 * self.tokens * 2 * self.d * self.f
        assert self.compiled(E) == [4 * useful, 4 * useful]


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"ragged.*expected one of"):
        gm.choose("ragged", "cpu", 1, 8, 2)
