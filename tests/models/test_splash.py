"""jax's splash attention kernels and its grouped product of a TPU, in interpret mode, against attention by blocks and plain products."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_pair import both
from support import assert_close_to_largest

from moejax.models.ops import flash
from moejax.models.ops.grouped import ragged
from moejax.models.ops.splash import splash_attention

SPLASH = jax.jit(partial(splash_attention, interpret=True))


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(2, 150, 2, 1, 64), (1, 128, 4, 4, 128), (1, 257, 4, 2, 128), (3, 384, 2, 1, 128)])
def test_splash_is_exact(shape, dtype):
    """Lengths that are no whole block, grouped queries, segments inside of blocks."""
    for name, ours, reference in zip(("out", "dq", "dk", "dv"), *both(SPLASH, *shape, dtype), strict=True):
        as_numbers = (np.asarray(a, np.float32) for a in (ours, reference))
        assert_close_to_largest(*as_numbers, 2e-6 if dtype == "float32" else 2e-2, name)


@pytest.mark.parametrize("rows", [128, pytest.param(300, marks=pytest.mark.long)])
def test_the_kernel_of_gradients_is_the_sum_over_each_group(rows):
    """Empty groups are zero, and rows behind the last one are of none."""
    drawn, sizes = np.random.default_rng(rows), np.array([0, 70, 0, 37, 5])
    dy, x = (drawn.standard_normal((rows, width)).astype(np.float32) for width in (16, 40))
    dy[sizes.sum() :] = np.nan
    found = ragged.kernel_gradient(jnp.asarray(sizes, jnp.int32), jnp.asarray(dy), jnp.asarray(x), interpret=True)
    ends = np.cumsum(sizes)
    expected = np.stack([dy[end - size : end].T @ x[end - size : end] for end, size in zip(ends, sizes, strict=True)])
    assert_close_to_largest(found, expected, 2e-6, "gradient")


def test_where_the_kernels_of_a_tpu_run():
    assert flash.refusal("TPU v5 lite", jnp.bfloat16, 128) is None
    assert "training.compute_dtype is float32" in flash.refusal("TPU v5 lite", jnp.float32, 128)
    assert "64, 128, 256 numbers, and the model's have 48" in flash.refusal("TPU v6 lite", jnp.bfloat16, 48)
    assert ragged.refusal("TPU v5 lite") is None and "for a TPU" in ragged.refusal("NVIDIA L4")
