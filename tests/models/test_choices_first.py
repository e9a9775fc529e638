"""A TPU's routing has the choices on the first axis: the same choices, rows and keys, in arrays that it does not fill up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.models.config import PRESETS
from moejax.models.layers import Target
from moejax.models.moe import MoE
from moejax.models.ops.grouped import matmul as gm

N = 24


def test_a_layer_computes_the_same():
    config = PRESETS["mixtral-tiny"]
    x, key = jax.random.normal(jax.random.key(1), (N, config.hidden_size)), jax.random.key(0)
    valid = jnp.arange(N) % 7 > 0

    def layer(platform):
        moe = MoE(key, config.stacks[0].block.feed_forward, config, jnp.float32, Target("loop", platform))
        out, pull, stats = jax.vjp(lambda x: moe(x, valid, micro_batches=2), x, has_aux=True)
        return out, pull(jnp.cos(out))[0], *stats

    for own, first in zip(jax.jit(layer, static_argnums=0)("cpu"), jax.jit(layer, static_argnums=0)("TPU v5 lite"), strict=True):
        assert own.shape == first.shape
        np.testing.assert_allclose(own, first, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_choice_has_the_same_row_and_key(micro_batches):
    experts = jax.random.randint(jax.random.key(0), (N, 3), 0, 5)
    valid, keys = jnp.arange(N) % 5 > 0, jax.random.split(jax.random.key(2), micro_batches)
    own, first = gm.group(experts, valid, 5, 8), gm.group(experts.T, valid, 5, 8, first=True)
    assert first.position.shape == (3, N) and np.array_equal(own.sizes, first.sizes)
    live = valid[:, None] & jnp.ones((N, 3), bool)
    for of in (lambda g: g.token, lambda g: g.number, lambda g: gm.row_keys(keys, g)):
        found, same = of(own)[own.position], jnp.swapaxes(of(first)[first.position], 0, 1)
        assert np.array_equal(found[live], same[live])
    assert np.all(first.token[-8:] == N) and np.all(first.number[-8:] == N * 3)
