"""An attention kernel next to attention by blocks: what the tests of every kernel share."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.models.ops.attention import segment_attention


def both(attend, rows, length, heads, kv, head_dim, dtype=jnp.float32):
    """Output and gradients of q, k, v by `attend`, and by blocks; segments end anywhere, padding is the last."""
    drawn = np.random.default_rng(length)
    q, k, v, dy = (jnp.asarray(drawn.standard_normal((rows, length, n, head_dim)), dtype) for n in (heads, kv, kv, heads))
    segments = np.sort(drawn.integers(1, 5, (rows, length)), axis=1).astype(np.int32)
    segments[:, -5:] = 0

    def through(attend):
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, segments), q, k, v)
        return out, *pull(dy)

    return through(attend), jax.jit(lambda: through(segment_attention))()
