"""Everything public that a loss can be made of differentiates inside and outside of `jit` and `jax.checkpoint`, to the same gradients."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY

from moejax.data.batch import Batch
from moejax.models.build import build
from moejax.models.config import PRESETS, LoRAConfig, Quantization
from moejax.models.decoder import load_balancing_loss
from moejax.models.layers import REMAT_POLICIES
from moejax.models.moe import RouterStats
from moejax.models.ops import attention, linear, quantized, selective_scan
from moejax.models.ops.cross_entropy import linear_cross_entropy
from moejax.models.ops.grouped import matmul as gm
from moejax.training.program import split
from moejax.training.step import Objective, sums

ARRANGEMENTS = {
    "grad of jit": lambda f: jax.grad(jax.jit(f)),
    "grad of checkpoint of jit": lambda f: jax.grad(jax.checkpoint(jax.jit(f))),
    "jit of grad of jit of checkpoint": lambda f: jax.jit(jax.grad(jax.jit(jax.checkpoint(f)))),
}
N, E, K, D, F, R, T, V = 6, 4, 2, 64, 32, 2, 8, 16


def drawn(*shape):
    """The same numbers for the same shape."""
    return jnp.asarray(np.random.default_rng(list(shape)).normal(size=shape), jnp.float32)


def weights_of(storage, *shape):
    """Arrays, or 4-bit weights of any codes and scales."""
    if storage != "nf4":
        return drawn(*shape)
    held = quantized.abstract("nf4-double", shape)
    return jax.tree.map(lambda leaf: jnp.asarray(np.abs(10 * drawn(*leaf.shape)), leaf.dtype), held)


def frozen(storage):
    weight = weights_of(storage.removesuffix(" of a layer"), *(3,) * storage.endswith("layer"), F, D)
    if storage.endswith("layer"):
        weight = linear.OfLayer(weight, jnp.int32(1))
    return lambda x: linear.with_frozen(linear.matmul, "dequant", weight, x), drawn(N, D)


def experts(backend, storage):
    """Trained arrays, or NF4 under adapters; every piece of the sparse path."""
    trained = storage == "trained"
    plan = gm.choose(backend, "cpu", N, E, K)._replace(trainable=trained, activation=jnp.multiply)
    chosen = jnp.asarray([[i % E, (i + 1) % E] for i in range(N)], jnp.int32)
    groups = gm.group(chosen, jnp.ones(N, bool), E, plan.tile)
    held = [weights_of(storage, E, F, D), weights_of(storage, E, F, D), weights_of(storage, E, D, F)]
    pairs = [gm.LoRAWeights(drawn(E, R, i), drawn(E, o, R)) for o, i in ((F, D), (F, D), (D, F))]

    def mlp(trainable):
        x, p, weights = trainable
        *inputs, output = (gm.Projection(w) if trained else gm.Projection(h, w) for h, w in zip(held, weights, strict=True))
        return gm.grouped_mlp(plan, x, gm.sort_weights(p, groups), groups, tuple(inputs), output)

    return mlp, (drawn(N, D), drawn(N, K), held if trained else pairs)


def dense(storage):
    weight = weights_of(storage, E, F, D)
    if storage == "nf4":
        return lambda x: gm.dense_matmul("nd,efd->enf", x, weight, "w1", trainable=False), drawn(N, D)
    return lambda a: gm.dense_matmul("nd,efd->enf", a[0], a[1], "w1", trainable=True), (drawn(N, D), weight)


def scan(form):
    def y(operands):
        u, dt, a, *rest = operands
        starts = jnp.arange(T)[None] == 3
        return selective_scan.selective_scan(u, jnp.abs(dt), -jnp.abs(a), *rest[:3], starts, rest[3], form=form, chunk=4, interpret=True)

    return y, (drawn(1, T, 3), 0.1 * drawn(1, T, 3), drawn(3, 2), drawn(1, T, 2), drawn(1, T, 2), drawn(3), drawn(1, 3, 2))


def segment_attention():
    segments = jnp.asarray([[1] * 5 + [2] * 3], jnp.int32)
    return lambda qkv: attention.segment_attention(*qkv, segments), (drawn(1, T, 4, 2), drawn(1, T, 2, 2), drawn(1, T, 2, 2))


def masked_attention():
    mask = jnp.tril(jnp.ones((1, T, T), bool))
    return lambda qkv: attention.masked_attention(*qkv, mask), (drawn(1, T, 4, 2), drawn(1, 2, T, 2), drawn(1, 2, T, 2))


def cross_entropy(trainable):
    targets, mask = jnp.arange(N, dtype=jnp.int32), jnp.ones(N)
    loss = partial(linear_cross_entropy, 4, 0.1, trainable)
    if trainable:
        return lambda a: loss(a[0], a[1], targets, mask), (drawn(N, D), drawn(V, D))
    return lambda hidden: loss(hidden, drawn(V, D), targets, mask), drawn(N, D)


def scales(double):
    """Of a 4-bit weight: what of it is a number that can be differentiated in."""
    weight = weights_of("nf4", F, D)
    if not double:
        weight = replace(weight, absmax=jnp.ones(weight.absmax.shape), nested_absmax=None, offset=None)
    name = "nested_absmax" if double else "absmax"

    def values(scale):
        return replace(weight, **{name: scale}).dequantize(jnp.float32)

    return values, getattr(weight, name)


FUNCTIONS = {
    **{f"with_frozen {s}": partial(frozen, s) for s in ("array", "nf4", "array of a layer", "nf4 of a layer")},
    **{f"grouped_mlp {b} {s}": partial(experts, b, s) for b in gm.BACKENDS for s in ("trained", "nf4")},
    **{f"dense_matmul {s}": partial(dense, s) for s in ("trained", "nf4")},
    **{f"selective_scan {form}": partial(scan, form) for form in selective_scan.CHUNKS},
    "segment_attention": segment_attention,
    "masked_attention": masked_attention,
    "cross_entropy, head trained": partial(cross_entropy, True),
    "cross_entropy, head frozen": partial(cross_entropy, False),
    "nf4 scales": partial(scales, False),
    "nf4 double scales": partial(scales, True),
}


def assert_differentiates(loss, at, arrangements=("grad of jit", "jit of grad of jit of checkpoint")):
    """To the gradients that `jit` of the gradient has. Run, not only traced: a residual that is no array is found when the program runs."""
    expected = jax.tree.leaves(jax.jit(jax.grad(loss))(at))
    assert all(np.abs(g).max() > 0 for g in expected)
    for name in arrangements:
        for a, b in zip(jax.tree.leaves(ARRANGEMENTS[name](loss)(at)), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1e-3, float(np.abs(b).max())), err_msg=name)


def loss_of(name):
    function, at = FUNCTIONS[name]()
    return lambda at: sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(function(at))), at


SLOW = ("kernel", "decode", "ragged")  # a CPU interprets the first two, and expands the third


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if any(word in name for word in SLOW) else name for name in FUNCTIONS]
)
def test_functions(name):
    assert_differentiates(*loss_of(name), ["grad of jit"])


@pytest.mark.long
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_under_checkpoint(name):
    assert_differentiates(*loss_of(name), list(ARRANGEMENTS)[1:])


KINDS = {
    "full": {},
    "lora": {"adapter": LoRAConfig(2, 4.0, 0.0, ("gate", "w1", "w2", "w3"))},
    "nf4": {"adapter": LoRAConfig(2, 4.0, 0.0, ("gate", "w1", "w2", "w3")), "quantization": Quantization()},
}
ARCHITECTURES = {
    "mixtral": PRESETS["mixtral-tiny"].replace(vocab_size=V, **TINY),
    "blackmamba": PRESETS["blackmamba-tiny"].replace(vocab_size=V, hidden_size=32, intermediate_size=32, num_layers=4, num_experts=4),
}


def model_loss(family, kind, remat):
    model = build(ARCHITECTURES[family], key=jax.random.key(0), dtype=jnp.float32, **KINDS[kind])
    graphdef, trainable, rest = split(model, full=kind == "full")
    trainable = jax.tree.map(lambda a: a + 0.01, trainable)  # an adapter's B begins at zero, and A's gradient with it
    objective = Objective(graphdef, full=kind == "full", remat=remat, chunk_tokens=4, aux_loss_coef=0.01)
    tokens = jnp.arange(T, dtype=jnp.int32)[None] % V
    ones = jnp.ones_like(tokens)
    batch = Batch(tokens, tokens, ones.astype(jnp.float32), ones, tokens)
    return lambda trainable: sums(objective, trainable, rest, batch, None)[0], trainable


def test_a_loss_of_frozen_4_bit_weights():
    assert_differentiates(*model_loss("mixtral", "nf4", "none"), ["grad of checkpoint of jit"])


@pytest.mark.long
@pytest.mark.parametrize("remat", REMAT_POLICIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_all_losses(family, kind, remat):
    assert_differentiates(*model_loss(family, kind, remat), ARRANGEMENTS)


def test_the_balance_loss():
    def loss(probabilities):
        return load_balancing_loss(RouterStats(jnp.full((2, E), 3, jnp.int32), probabilities), jnp.int32(N))

    assert_differentiates(loss, jnp.abs(drawn(2, E)), ARRANGEMENTS)
