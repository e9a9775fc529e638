"""Every backend of the grouped matmul next to the plain fp32 product: all patterns of empty groups, sizes that are multiples of nothing,
both precisions, all kinds of weights; values and gradients."""

from functools import cache, partial
from itertools import combinations, product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.models.ops import quantized
from moejax.models.ops.grouped import matmul as gm
from moejax.models.ops.quantized import KINDS

E, D, F, N, R = 5, 37, 53, 41, 3
BLOCKS = (32, 96)  # in the place of D and F, for a storage whose rows are whole blocks of 32


def gated(up, gate):
    return jax.nn.silu(up) * gate


# A tile is less than a third of a group that has all rows, and a batch of 12 rows leaves some of it.
PLANS = {backend: gm.Plan(backend, 8, 4, gated, capacity=12) for backend in gm.BACKENDS}
QUICK = [name if name not in ("ragged", "decode") else pytest.param(name, marks=pytest.mark.long) for name in PLANS]
"""A CPU expands `ragged`, one of whose cases is quick, and interprets `decode` (its quick one: test_decode.py)."""
EVERY = [name if name != "decode" else pytest.param(name, marks=pytest.mark.long) for name in PLANS]
# Largest difference, of the largest element of the same array. Found: 1.2e-6 in fp32; in bf16 2.5e-2, of the routing weights' gradient.
BOUNDS = {"float32": 3e-6, "bfloat16": 4e-2}


def make_weights(storage, dtype):
    """(matrix, bias) of w1, w3, w2 as the model holds them, the same as fp32 numbers, and adapters (fp32, as adapters are)."""
    rng = np.random.default_rng(0)
    d, f = BLOCKS if storage == "mxfp4" else (D, F)
    shapes = ((f, d), (f, d), (d, f))
    matrices = [jnp.asarray(rng.normal(size=(E, *s)) / 4, jnp.float32) for s in shapes]
    loras = [
        gm.LoRAWeights(*(jnp.asarray(rng.normal(size=s) / 4, jnp.float32) for s in ((E, R, i), (E, o, R)))) for o, i in shapes
    ]
    biases = [jnp.asarray(rng.normal(size=(E, o)), dtype) for o, _ in shapes]
    numbers_of_biases = [b.astype(jnp.float32) for b in biases]
    if storage in KINDS:
        stored = [quantized.quantize(storage, w) for w in matrices]
        numbers = [w.dequantize(jnp.float32).astype(dtype).astype(jnp.float32) for w in stored]
    else:
        stored = [w.astype(dtype) for w in matrices]
        numbers = [w.astype(jnp.float32) for w in stored]
    return list(zip(stored, biases, strict=True)), list(zip(numbers, numbers_of_biases, strict=True)), loras


def reference(x, p, matrices, loras, experts, valid):
    """Every token through every expert in fp32, and then what was chosen."""
    a = [lora.a if lora.a is not None else loras[0].a for lora in loras]
    biases = [b for _, b in matrices]
    up, gate, output = (w + jnp.einsum("eor,eri->eoi", lora.b, a) for (w, _), lora, a in zip(matrices, loras, a, strict=True))
    hidden = gated(jnp.einsum("nd,efd->nef", x, up) + biases[0], jnp.einsum("nd,efd->nef", x, gate) + biases[1])
    products = jnp.einsum("nef,edf->ned", hidden, output) + biases[2]
    picked = jnp.take_along_axis(products, experts[..., None], axis=1)
    return jnp.sum(picked * p[..., None], axis=1) * valid[:, None]


def ours(plan, x, p, matrices, loras, experts, valid):
    groups = gm.group(experts, valid, E, plan.tile)
    up, gate, output = (gm.Projection(w, lora, bias) for (w, bias), lora in zip(matrices, loras, strict=True))
    return gm.grouped_mlp(plan, x, gm.sort_weights(p, groups).astype(x.dtype), groups, (up, gate), output)


@cache
def gradients(function, trained):
    """jitted: values, and gradients of x, p, the adapters, and the matrices if they are trained."""

    def loss(free, matrices, *rest):
        x, p, loras, weights = free
        *routing, cotangent = rest
        y = function(x, p, weights if trained else matrices, loras, *routing).astype(jnp.float32)
        return jnp.sum(y * cotangent), y

    def run(x, p, matrices, loras, *rest):
        slopes, y = jax.grad(loss, has_aux=True)((x, p, loras, matrices if trained else None), matrices, *rest)
        return y, *slopes

    return jax.jit(run)


def routings(k):
    """Every set of at least k experts that have tokens, and then the others none; one routing for each."""
    rng = np.random.default_rng(1)
    for count in range(k, E + 1):
        for chosen in combinations(range(E), count):
            yield np.stack([rng.permutation(chosen)[:k] for _ in range(N)]).astype(np.int32)


def worst_difference(found, expected):
    """Of all arrays: the largest difference over the largest element of the expected one (0 where both are zero)."""
    worst = 0.0
    for a, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float32), np.asarray(e, np.float32)
        difference, scale = np.abs(a - e).max(), np.abs(e).max()
        worst = max(worst, difference / scale if scale else difference)
    return worst


@pytest.mark.parametrize(
    ("storage", "dtype"),
    [("trained", "float32"), ("mxfp4", "float32"), ("trained", "bfloat16"), ("nf4-double", "bfloat16"),
     *(pytest.param(*case, marks=pytest.mark.long) for case in (("nf4", "float32"), ("nf4-double", "float32"), ("mxfp4", "bfloat16")))],
)  # fmt: skip
@pytest.mark.parametrize("backend", QUICK)
def test_every_pattern_of_empty_groups(backend, storage, dtype):
    """In fp32 with k = 1, where one expert may take every token; in bf16 with k = 2 and padding."""
    k, padding = (1, 0) if dtype == "float32" else (2, 7)
    trained = storage == "trained"
    matrices, numbers, loras = make_weights(storage, dtype)
    rng, width = np.random.default_rng(2), numbers[0][0].shape[-1]
    found_by = gradients(partial(ours, PLANS[backend]._replace(trainable=trained)), trained)
    for experts in routings(k):
        x = jnp.asarray(rng.normal(size=(N, width)), dtype)
        p = jnp.asarray(rng.uniform(size=(N, k)), jnp.float32)
        rest = (jnp.asarray(experts), jnp.arange(N) < N - padding, jnp.asarray(rng.normal(size=(N, width)), jnp.float32))
        expected = gradients(reference, trained)(x.astype(jnp.float32), p, numbers, loras, *rest)
        found = found_by(x, p, matrices, loras, *rest)
        assert worst_difference(found, expected) < BOUNDS[dtype], sorted(set(experts.ravel()))


@pytest.mark.parametrize("tokens", [pytest.param(1, marks=pytest.mark.long), 2])
@pytest.mark.parametrize("backend", QUICK)
def test_fewer_rows_than_experts(backend, tokens):
    """As while decoding, when the loop leaves out experts that cannot have a row: every choice of two experts for each token."""
    matrices, numbers, loras = make_weights("nf4-double", "float32")
    rng = np.random.default_rng(3)
    found_by = gradients(partial(ours, PLANS[backend]), False)
    for experts in product(combinations(range(E), 2), repeat=tokens):
        x = jnp.asarray(rng.normal(size=(tokens, D)), jnp.float32)
        p = jnp.asarray(rng.uniform(size=(tokens, 2)), jnp.float32)
        rest = (jnp.asarray(experts), jnp.ones(tokens, bool), jnp.asarray(rng.normal(size=(tokens, D)), jnp.float32))
        expected = gradients(reference, False)(x, p, numbers, loras, *rest)
        # The routing weights' gradient has so few numbers here that all may be small sums of large ones. Found: 3.1e-6.
        assert worst_difference(found_by(x, p, matrices, loras, *rest), expected) < 1e-5, experts


@pytest.mark.parametrize("backend", ["loop", "capacity"])
def test_kept_hidden_rows_give_the_same_gradients(backend):
    matrices, _, loras = make_weights("trained", "float32")
    rng = np.random.default_rng(3)
    x, cotangent = (jnp.asarray(rng.normal(size=(N, D)), jnp.float32) for _ in range(2))
    p, valid = jnp.asarray(rng.uniform(size=(N, 2)), jnp.float32), jnp.arange(N) < N - 3
    plan = PLANS[backend]._replace(trainable=True)
    functions = [gradients(partial(ours, plan._replace(keep=keep)), True) for keep in (False, True)]
    for experts in routings(2):
        recomputed, kept = (f(x, p, matrices, loras, jnp.asarray(experts), valid, cotangent) for f in functions)
        assert worst_difference(kept, recomputed) < 1e-6


def test_dropout_is_the_same_in_both_passes():
    """With a fixed key the function is a fixed one: its gradient is its slope."""
    matrices, _, loras = make_weights("frozen", "float32")
    rng = np.random.default_rng(4)
    experts = jnp.asarray(next(r for r in routings(2) if len(set(r.ravel())) == E))
    groups = gm.group(experts, jnp.ones(N, bool), E, 16)
    x, cotangent, direction = (jnp.asarray(rng.normal(size=(N, D)), jnp.float32) for _ in range(3))
    up, gate, output = (gm.Projection(w, lora, bias) for (w, bias), lora in zip(matrices, loras, strict=True))
    plan = PLANS["capacity"]._replace(dropout=0.3, activation=lambda up, gate: jnp.tanh(up) * gate)

    @jax.jit
    @jax.value_and_grad
    def loss(step, key):
        ones = jnp.ones(groups.choice.shape)
        y = gm.grouped_mlp(plan, x + step * direction, ones, groups, (up, gate), output, gm.row_keys(key, groups))
        return jnp.sum(y * cotangent)

    h, key = 1e-3, jax.random.key(1)
    slope = (loss(h, key)[0] - loss(-h, key)[0]) / (2 * h)
    value, gradient = loss(0.0, key)
    np.testing.assert_allclose(gradient, slope, rtol=5e-3)
    assert abs(value - loss(0.0, jax.random.key(2))[0]) > 1e-2


@pytest.mark.parametrize(("storage", "dtype"), [("nf4-double", "float32"), pytest.param("frozen", "bfloat16", marks=pytest.mark.long)])
@pytest.mark.parametrize("backend", QUICK)
def test_one_a_for_both_inputs(backend, storage, dtype):
    """Its gradient is the sum of what both products give it."""
    matrices, numbers, (up, gate, output) = make_weights(storage, dtype)
    loras = [up, gate._replace(a=None), output]
    rng = np.random.default_rng(5)
    found_by = gradients(partial(ours, PLANS[backend]), False)
    for experts in [*routings(2)][::4]:
        x, p = jnp.asarray(rng.normal(size=(N, D)), dtype), jnp.asarray(rng.uniform(size=(N, 2)), jnp.float32)
        rest = (jnp.asarray(experts), jnp.arange(N) < N - 3, jnp.asarray(rng.normal(size=(N, D)), jnp.float32))
        expected = gradients(reference, False)(x.astype(jnp.float32), p, numbers, loras, *rest)
        assert worst_difference(found_by(x, p, matrices, loras, *rest), expected) < BOUNDS[dtype], sorted(set(experts.ravel()))


@pytest.mark.parametrize("backend", EVERY)
def test_one_a_has_one_mask(backend):
    """Two equal matrices with equal B's give equal rows under dropout where the A is one, and others where each has its own."""
    matrices, _, (up, *_) = make_weights("frozen", "float32")
    rng = np.random.default_rng(6)
    groups = gm.group(jnp.asarray(next(routings(2))), jnp.ones(N, bool), E, 16)
    x, ones = jnp.asarray(rng.normal(size=(N, D)), jnp.float32), jnp.ones(groups.choice.shape)
    plan = PLANS[backend]._replace(dropout=0.3, activation=jnp.subtract)

    @jax.jit
    def largest(second):
        inputs = gm.Projection(matrices[0][0], up), gm.Projection(matrices[0][0], second)
        y = gm.grouped_mlp(plan, x, ones, groups, inputs, gm.Projection(matrices[2][0]), gm.row_keys(jax.random.key(1), groups))
        return jnp.abs(y).max()

    assert largest(up._replace(a=None)) == 0.0 and largest(up) > 0.1
