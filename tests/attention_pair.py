"""An attention kernel next to attention by blocks: what the tests of every kernel share."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from moejax.models.ops.attention import segment_attention


def both(attend, rows, length, heads, kv, head_dim, dtype=jnp.float32, sinks=None, window=None):
    """Output and gradients of q, k, v (and of sinks, where there are any) by `attend`, and by blocks; segments end anywhere, padding is
    the last."""
    drawn = np.random.default_rng(length)
    q, k, v, dy = (jnp.asarray(drawn.standard_normal((rows, length, n, head_dim)), dtype) for n in (heads, kv, kv, heads))
    segments = np.sort(drawn.integers(1, 5, (rows, length)), axis=1).astype(np.int32)
    segments[:, -5:] = 0
    more = {} if sinks is None else {"sinks": jnp.asarray(sinks, jnp.float32)}

    def through(attend):
        def of(qkv, more):
            return attend(*qkv, segments, **more)

        out, pull = jax.vjp(of, (q, k, v), more)
        of_qkv, of_more = pull(dy)
        return out, *of_qkv, *of_more.values()

    reference = segment_attention if window is None else partial(segment_attention, window=window)
    return jax.jit(lambda: (through(attend), through(reference)))()
