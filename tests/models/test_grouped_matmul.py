"""The dropless grouped matmul: exact for every routing, in values and gradients, and no FLOP too many."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import dot_flops

from moejax.models.ops import quantized
from moejax.models.ops.grouped import matmul as gm

E, D, F, N, K, R = 8, 32, 48, 40, 2, 4

ROUTINGS = {
    "random": lambda rng: np.stack([rng.permutation(E)[:K] for _ in range(N)]),
    "all to two experts": lambda rng: np.tile([5, 2], (N, 1)),
    "first experts empty": lambda rng: np.stack([4 + rng.permutation(4)[:K] for _ in range(N)]),
    "last experts empty": lambda rng: np.stack([rng.permutation(3)[:K] for _ in range(N)]),
    "one token each": lambda rng: np.stack([[i % E, (i + 1) % E] for i in range(N)]),
}


def make_weights(rng, *, adapted=True):
    """Input projections (two: a gated MLP) and the output projection, with adapters."""

    def projection(out_size, in_size):
        a, b, w = (
            jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((E, R, in_size), (E, out_size, R), (E, out_size, in_size))
        )
        return gm.Projection(0.2 * w, gm.LoRAWeights(0.3 * a, 0.3 * b) if adapted else None)

    return (projection(F, D), projection(F, D)), projection(D, F)


def effective(projection):
    """The matrices with the adapters merged in: [E, O, I]."""
    return projection.weight + (
        0 if projection.lora is None else jnp.einsum("eor,eri->eoi", projection.lora.b, projection.lora.a)
    )


def reference(x, weights, inputs, output, experts, valid):
    """Every choice by itself, every expert for every token: y[n] = Σ_k p[n, k] W2[e] (tanh(W1[e] x) · W3[e] x)."""
    up, gate = (jnp.einsum("nd,efd->nef", x, effective(p)) for p in inputs)
    products = jnp.einsum("nef,edf->ned", gated(up, gate), effective(output))
    picked = jnp.take_along_axis(products, experts[..., None], axis=1)
    return jnp.sum(picked * weights[..., None], axis=1) * valid[:, None]


def gated(up, gate):
    return jnp.tanh(up) * gate


def ours(x, weights, inputs, output, experts, valid, plan, key=None):
    groups = gm.group(experts, valid, E, plan.tile)
    return gm.grouped_mlp(plan, x, gm.sort_weights(weights, groups).astype(x.dtype), groups, inputs, output, gm.row_keys(key, groups))


def make_inputs(routing, padding, seed=0):
    rng = np.random.default_rng(seed)
    experts = jnp.asarray(ROUTINGS[routing](rng), jnp.int32)
    x, cotangent = (jnp.asarray(rng.normal(size=(N, D)), jnp.float32) for _ in range(2))
    weights = jnp.asarray(rng.uniform(size=(N, K)), jnp.float32)
    return rng, experts, jnp.arange(N) < N - padding, x, weights, cotangent


PLAN = gm.Plan("loop", tile=16, small_tile=4, activation=gated)


@partial(jax.jit, static_argnums=0)
@partial(jax.value_and_grad, argnums=(1, 2, 3, 4))
def loss_of(plan, x, weights, inputs, output, experts, valid, cotangent):
    """Of the plan's product; None: of the reference."""
    function = reference if plan is None else partial(ours, plan=plan)
    return jnp.sum(function(x, weights, inputs, output, experts, valid) * cotangent)


@pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
@pytest.mark.parametrize("padding", [0, 13])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_values_and_gradients(routing, padding, keep):
    rng, experts, valid, x, weights, cotangent = make_inputs(routing, padding)
    arguments = (x, weights, *make_weights(rng), experts, valid, cotangent)
    expected = loss_of(None, *arguments)
    found = loss_of(PLAN._replace(trainable=True, keep=keep), *arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)


def test_frozen_nf4_weights():
    rng, experts, valid, x, weights, cotangent = make_inputs("random", 0, seed=1)
    inputs, output = make_weights(rng)

    def swap(projections, function):
        return jax.tree.map(
            lambda p: p._replace(weight=function(p)), projections, is_leaf=lambda p: isinstance(p, gm.Projection)
        )

    codes = swap((inputs, output), lambda p: quantized.quantize("nf4-double", p.weight))
    loras = jax.tree.map(lambda p: p.lora, (inputs, output), is_leaf=lambda p: isinstance(p, gm.Projection))

    def loss(function, projections, x, loras):
        whole = jax.tree.map(
            lambda p, lora: p._replace(lora=lora), projections, loras, is_leaf=lambda p: isinstance(p, gm.Projection)
        )
        return jnp.sum(function(x, weights, *whole, experts, valid) * cotangent)

    numbers = swap(codes, lambda p: p.weight.dequantize(jnp.float32))
    found = jax.jit(jax.value_and_grad(partial(loss, partial(ours, plan=PLAN), codes), argnums=(0, 1)))(x, loras)
    expected = jax.jit(jax.value_and_grad(partial(loss, reference, numbers), argnums=(0, 1)))(x, loras)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)


def test_adapters_on_some_projections_only():
    rng, experts, valid, x, weights, _ = make_inputs("random", 3, seed=2)
    (first, second), output = make_weights(rng)
    for inputs, out in (
        ((first, second._replace(lora=None)), output),
        ((first._replace(lora=None), second), output._replace(lora=None)),
    ):
        found = jax.jit(partial(ours, plan=PLAN))(x, weights, inputs, out, experts, valid)
        np.testing.assert_allclose(found, jax.jit(reference)(x, weights, inputs, out, experts, valid), atol=1e-4)


def test_dropout_is_the_same_in_both_passes():
    """With a fixed key the function is a fixed one: its gradient is its slope, kept or recomputed; another key, another function."""
    rng, experts, valid, x, weights, cotangent = make_inputs("random", 0, seed=3)
    inputs, output = make_weights(rng)
    direction = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), (x, inputs, output))

    @partial(jax.jit, static_argnums=2)
    @jax.value_and_grad
    def both(step, key, plan):
        moved = jax.tree.map(lambda a, d: a + step * d, (x, inputs, output), direction)
        return jnp.sum(ours(moved[0], weights, *moved[1:], experts, valid, plan, key) * cotangent)

    plan, key = PLAN._replace(dropout=0.3, trainable=True), jax.random.key(1)
    h = 1e-3

    def loss(step, key, plan):
        return both(step, key, plan)[0]

    slope = (loss(h, key, plan) - loss(-h, key, plan)) / (2 * h)
    for keep in (False, True):
        np.testing.assert_allclose(both(0.0, key, plan._replace(keep=keep))[1], slope, rtol=5e-3)
    assert abs(loss(0.0, key, plan) - loss(0.0, jax.random.key(2), plan)) > 1e-2
    assert loss(0.0, None, plan) == loss(0.0, None, PLAN)


def test_bfloat16_is_close_to_float32():
    rng, experts, valid, x, weights, _ = make_inputs("random", 0, seed=4)
    arguments = (x, weights, *make_weights(rng))

    def run(dtype):
        rounded = jax.tree.map(lambda a: a.astype(dtype), arguments)
        return np.asarray(jax.jit(partial(ours, plan=PLAN))(*rounded, experts, valid), np.float32)

    exact = run(jnp.float32)
    assert np.abs(run(jnp.bfloat16) - exact).max() < 0.02 * np.abs(exact).max()


class TestFlops:
    """At E = 8, k = 2, 4096 tokens: the bars of the design, from the compiled module and the trip counts of a random routing.

    Frozen weights, hidden rows kept: three products per row forward, three backward.
    """

    tokens, d, f = 4096, 64, 96
    useful = 2 * tokens * 2 * 3 * d * f

    def compiled(self, k, *, keep=True):
        rng = np.random.default_rng(0)
        experts = jnp.asarray(np.stack([rng.permutation(E)[:k] for _ in range(self.tokens)]), jnp.int32)
        x = jnp.ones((self.tokens, self.d))
        w1, w3, w2 = (
            jnp.asarray(rng.normal(size=(E, *s)), jnp.float32) for s in ((self.f, self.d), (self.f, self.d), (self.d, self.f))
        )
        plan = gm.choose("auto", "cpu", self.tokens, E, k)._replace(keep=keep)

        def forward(x):
            if k == E:
                up, gate = (gm.dense_matmul("nd,efd->enf", x, w, name, trainable=False) for name, w in (("w1", w1), ("w3", w3)))
                return gm.dense_matmul("enf,edf->nd", up * gate, w2, "w2", trainable=False)
            groups = gm.group(experts, jnp.ones(self.tokens, bool), E, plan.tile)
            return gm.grouped_mlp(plan, x, jnp.ones(groups.token.shape), groups, (gm.Projection(w1), gm.Projection(w3)), gm.Projection(w2))

        def both(x, dy):
            return jax.vjp(forward, x)[1](dy)[0]

        sizes = np.bincount(np.asarray(experts).reshape(-1), minlength=E)

        whole = sizes // plan.tile

        def trips(op_name):
            """Of the two tile loops: the mean over the experts."""
            return np.mean(-(-(sizes - whole * plan.tile) // plan.small_tile) if "small_tiles" in op_name else whole)

        y = jax.eval_shape(forward, x)
        texts = [jax.jit(forward).lower(x).compile().as_text(), jax.jit(both).lower(x, y).compile().as_text()]
        return [dot_flops(text, trips) for text in texts]

    def test_sparse_costs_at_most_1_4_times_the_useful(self):
        """`both` has no need of the output rows: two products forward and three backward, kept or computed again."""
        forward, both = self.compiled(2)
        assert self.useful <= forward <= 1.4 * self.useful, forward / self.useful
        for flops in (both, self.compiled(2, keep=False)[1]):
            assert 5 / 3 * self.useful <= flops <= 1.4 * 5 / 3 * self.useful, flops / self.useful

    def test_dense_costs_exactly_4_times_the_sparse_useful(self):
        forward, both = self.compiled(E)
        assert forward == 4 * self.useful and both == 5 / 3 * forward


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"triton.*expected one of"):
        gm.choose("triton", "cpu", 1, 8, 2)
