"""What is computed in fp32 although the stream is bf16, next to float64 from the same rounded inputs: a bf16 sum would be a thousand times
further away."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.models.config import PRESETS
from moejax.models.config.rope import Rope
from moejax.models.layers import RMSNorm, Target, rotate
from moejax.models.moe import MoE
from moejax.models.ops import attention
from moejax.models.ops.cross_entropy import linear_cross_entropy
from moejax.models.ops.grouped import expert

BF16 = jnp.bfloat16


def draw(seed, shape, scale=1.0):
    """(bf16 array, the same numbers in float64)."""
    rounded = jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), BF16)
    return rounded, np.asarray(rounded, np.float64)


def test_cross_entropy():
    (hidden, h), (weight, w) = draw(0, (40, 32)), draw(1, (96, 32))
    targets = np.random.default_rng(2).integers(0, 96, 40)
    logits = h @ w.T
    expected = (np.log(np.exp(logits).sum(-1)) - logits[range(40), targets]).sum()
    arguments = (hidden, weight, jnp.asarray(targets, jnp.int32), jnp.ones(40))
    found, (dhidden, dweight) = jax.jit(jax.value_and_grad(linear_cross_entropy, argnums=(3, 4)), static_argnums=(0, 1, 2))(
        16, 0.0, True, *arguments
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    slopes = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    slopes[range(40), targets] -= 1
    for ours, exact in ((dhidden, slopes @ w), (dweight, slopes.T @ h)):
        assert ours.dtype == BF16
        np.testing.assert_allclose(np.asarray(ours, np.float64), exact, rtol=0, atol=0.01 * np.abs(exact).max())


def test_attention_with_large_scores():
    """Scores of some tens: in bf16 they would be off by a tenth, and the weights with them."""
    (q, q64), (k, k64), (v, v64) = (draw(seed, (1, 24, 2, 16), scale) for seed, scale in ((0, 5.0), (1, 5.0), (2, 1.0)))
    out = jax.jit(attention.segment_attention)(q, k, v, jnp.ones((1, 24), jnp.int32))
    scores = np.einsum("bthc,bshc->bhts", q64, k64) / 4
    scores = np.where(np.tril(np.ones((24, 24), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bhts,bshc->bthc", weights / weights.sum(-1, keepdims=True), v64)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=0, atol=0.015 * np.abs(expected).max())


def test_rotary_angles_of_far_positions():
    x, x64 = draw(0, (1, 1, 1, 8))
    angle = 3001 * 1e6 ** (-np.arange(0, 8, 2) / 8)
    first, second = np.split(x64[0, 0, 0], 2)
    expected = np.concatenate([first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)])
    found = np.asarray(rotate(x, jnp.full((1, 1), 3001), Rope(1e6)), np.float64)[0, 0, 0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.01)


def test_norm_of_large_numbers():
    x, x64 = draw(0, (3, 512), 30.0)
    found = np.asarray(RMSNorm(512, 1e-5, BF16)(x), np.float64)
    np.testing.assert_allclose(found, x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-5), rtol=2**-8)


def test_router_probabilities():
    config = PRESETS["mixtral-tiny"].replace(hidden_size=64, num_experts=4)
    moe = MoE(jax.random.key(0), config.stacks[0].block.feed_forward, config, BF16, Target("loop", "cpu"))
    x, x64 = draw(0, (20, 64), 20.0)
    indices, weights, _ = moe._route(x, jnp.ones(20, bool), None)
    logits = x64 @ np.asarray(moe.router.weight.get_value(), np.float64).T
    order = np.argsort(-logits, axis=-1)[:, :2]
    np.testing.assert_array_equal(indices, order)
    chosen = np.exp(np.take_along_axis(logits, order, -1))
    np.testing.assert_allclose(weights, chosen / chosen.sum(-1, keepdims=True), rtol=1e-5)


def test_gradients_of_experts_are_summed_in_fp32():
    """600 equal tokens through one expert: a bf16 sum of ones ends at 256."""
    pair = expert.LoRAWeights(jnp.ones((1, 1, 4)), jnp.ones((1, 4, 1)))
    from moejax.models.ops.grouped import matmul as gm

    projection = gm.Projection(jnp.zeros((1, 4, 4), BF16), pair)
    rows, experts = jnp.ones((600, 4), BF16), jnp.zeros((600, 1), jnp.int32)

    def total(projection, backend):
        plan = gm.Plan(backend, 16, 4, lambda x: x, names=("w1", "w2"), capacity=320)
        groups = gm.group(experts, jnp.ones(600, bool), 1, plan.tile)
        weights = gm.sort_weights(jnp.ones((600, 1)), groups).astype(BF16)
        output = gm.Projection(jnp.eye(4, dtype=BF16)[None])
        return jnp.sum(gm.grouped_mlp(plan, rows, weights, groups, (projection,), output).astype(jnp.float32))

    for backend in ("loop", "capacity"):
        gradient = jax.jit(jax.grad(total), static_argnums=1)(projection, backend).lora
        np.testing.assert_array_equal(gradient.b, np.full((1, 4, 1), 600 * 4))
        np.testing.assert_array_equal(gradient.a, np.full((1, 1, 4), 600 * 4))
