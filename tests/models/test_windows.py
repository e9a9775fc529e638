"""Windows and sinks of attention by blocks, against the plain softmax over masked scores; packed rows, and the cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_close_to_largest

from moejax.models.ops.attention import masked_attention, segment_attention

T, H, G, C = 300, 4, 2, 8  # three blocks of queries


def drawn(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


def plain(q, k, v, sinks, segments, window):
    back = jnp.arange(T)[:, None] - jnp.arange(T)[None]
    mask = (segments[:, :, None] == segments[:, None, :]) & ((back >= 0) & (back < window))[None]
    return masked_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask, sinks)


@pytest.mark.parametrize("window", [1, 50, 2**30])
def test_values_and_gradients(window):
    """A window of one, one that ends inside of blocks, and none; a sink that nothing reaches, and one above all scores."""
    operands = (drawn(1, T, H, C), drawn(1, T, G, C), drawn(1, T, G, C) + 1, jnp.asarray([-30.0, 0.0, 1.5, 9.0]))
    segments = jnp.asarray(np.repeat([1, 2, 3, 0], [70, 131, 90, 9]))[None]
    cotangent = drawn(1, T, H, C)

    def through(attend):
        out, pull = jax.vjp(attend, *operands)
        return out, *pull(cotangent)

    ours = jax.jit(lambda window: through(lambda q, k, v, s: segment_attention(q, k, v, segments, window=window, sinks=s)))(window)
    expected = jax.jit(lambda: through(lambda *given: plain(*given, segments, window)))()
    for name, found, other in zip(("out", "dq", "dk", "dv", "dsinks"), ours, expected, strict=True):
        assert_close_to_largest(found, other, 4e-6, name)


def test_a_sink_is_a_sigmoid_of_the_log_sum():
    q, k, v = drawn(1, T, H, C), drawn(1, T, G, C), drawn(1, T, G, C)
    ones, sinks = jnp.ones((1, T), jnp.int32), jnp.asarray([-1.0, 0.0, 1.0, 2.0])
    scores = jnp.einsum("bthc,bshc->bhts", q, jnp.repeat(k, 2, axis=2)) * C**-0.5
    log_sums = jax.nn.logsumexp(jnp.where(jnp.tril(jnp.ones((T, T), bool)), scores, -jnp.inf), axis=-1)
    attend = jax.jit(segment_attention)
    expected = attend(q, k, v, ones) * jax.nn.sigmoid(log_sums - sinks[None, :, None]).swapaxes(1, 2)[..., None]
    np.testing.assert_allclose(attend(q, k, v, ones, sinks=sinks), expected, atol=2e-6)
