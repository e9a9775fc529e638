"""Kernels that multiply by 4-bit codes, interpreted on a CPU. All patterns of groups: test_grouped_backends.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.models.ops import quantized
from moejax.models.ops.grouped import decode, kernels
from moejax.models.ops.linear import OfLayer
from moejax.models.ops.quantized import KINDS


def stacked(kind, *shape):
    return quantized.quantize(kind, jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32))


def multiplied(weight, layer, sizes, rows, transposed=False):
    @jax.jit
    def run(weight, layer, sizes, rows):
        tiles = kernels.Tiles.of(sizes, rows.shape[0], rows.dtype, kernels.MOST_ROWS)
        products, w = decode.Products(tiles), decode.stack(OfLayer(weight, layer), rows.dtype)
        return (products.backward if transposed else products.forward)(rows, w)

    return run(weight, jnp.asarray(layer), jnp.asarray(sizes), rows)


EXACT = [("nf4-double", (16, 128), False)]
MORE = [(kind, shape, transposed) for kind in KINDS for shape in ((16, 256), (40, 96)) for transposed in (False, True)]
MORE += [("nf4", (53, 37), True), ("nf4-double", (53, 37), False)]


@pytest.mark.parametrize(("kind", "shape", "transposed"), [*EXACT, *(pytest.param(*case, marks=pytest.mark.long) for case in MORE)])
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.long)])
def test_a_row_with_a_single_one_gives_the_weights_to_the_bit(kind, shape, transposed, dtype):
    """Of the second of two layers, and of two of three experts; rows of none are not looked at."""
    out, inner = shape
    weight = stacked(kind, 2, 3, out, inner)
    ones = jnp.eye(out if transposed else inner, dtype=dtype)
    sizes = [len(ones), 0, 7]
    found = multiplied(weight, 1, sizes, jnp.concatenate([ones, ones[:7], jnp.full_like(ones[:2], jnp.nan)]), transposed)
    first, _, third = weight.dequantize(jnp.dtype(dtype))[1]
    expected = np.concatenate([first, third[:7]] if transposed else [first.T, third.T[:7]])
    np.testing.assert_array_equal(np.asarray(found, np.float32)[: sum(sizes)], np.asarray(expected, np.float32))


@pytest.mark.long
def test_large_tiles_of_arrays_for_many_rows():
    """Sizes that are multiples of nothing; twice the same bits."""
    rng, sizes = np.random.default_rng(1), [0, 283, 17]
    w, x, dy = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((3, 200, 72), (305, 72), (305, 200)))

    @jax.jit
    def run(w, x, dy):
        products = decode.Products(kernels.Tiles.of(jnp.asarray(sizes), len(x), x.dtype, kernels.LARGE))
        return products.forward(x, w), products.backward(dy, w), products.gradient(dy, x)

    assert kernels.Tiles.of(jnp.asarray(sizes), 305, x.dtype, kernels.LARGE).rows == 128
    found, again = run(w, x, dy), run(w, x, dy)
    w, x, dy = (np.asarray(a, np.float32) for a in (w, x[:300], dy[:300]))
    of = np.repeat(np.arange(3), sizes)
    sums = np.stack([dy[of == e].T @ x[of == e] for e in range(3)])
    expected = np.einsum("moi,mi->mo", w[of], x), np.einsum("moi,mo->mi", w[of], dy), sums
    for ours, same, right in zip(found, again, expected, strict=True):
        ours, same = (np.asarray(a, np.float32)[: len(right)] for a in (ours, same))
        assert np.abs(ours - right).max() < 6e-3 * np.abs(right).max() and (ours == same).all()


def test_bytes_that_jax_cannot_reach_are_copied():
    """gpt-oss-20b's stack has 3.2 GB of codes of a matrix: the offsets of its second half are negative in 32 bits."""
    for layers, far in ((12, False), (24, True), (48, False)):
        weight = quantized.abstract("mxfp4", (layers, 32, 2880, 2880))
        assert decode._unreachable(weight) == far
