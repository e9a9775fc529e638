"""NF4 against bitsandbytes 0.50.2, to the bit (tests/oracles/nf4.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import read_vectors

from moejax.models.ops import nf4, quantized

CASES = ("normal", "router", "zeros", "nested", "odd", "tiny", "bfloat16", "float16", "large")


def kind_of(double):
    return "nf4-double" if double else "nf4"


@pytest.fixture(scope="module")
def vectors():
    return read_vectors("nf4")


def test_dynamic_map(vectors):
    np.testing.assert_array_equal(nf4.DYNAMIC_MAP, vectors["dynamic_map"])


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_bit_identical(case, double, vectors):
    weight = jnp.asarray(vectors[f"{case}/weight"], str(vectors[f"{case}/dtype"]))
    key = f"{case}/{'double' if double else 'single'}"
    ours = quantized.encode(kind_of(double), weight)
    assert set(ours.parts) == {"codes", "absmax"} | ({"offset", "nested_absmax"} if double else set())
    for name, part in ours.parts.items():
        np.testing.assert_array_equal(part, vectors[f"{key}/{name}"])
    for dtype in ("float32", "bfloat16"):
        value = jax.jit(quantized.dequantized, static_argnums=1)(ours.tensor(), jnp.dtype(dtype))
        np.testing.assert_array_equal(np.asarray(value, np.float32), vectors[f"{key}/{dtype}"])


@pytest.mark.parametrize("name", nf4.LOOK_UPS)
def test_every_look_up_is_the_codebook_to_the_bit(name):
    values = np.asarray(jax.jit(nf4.LOOK_UPS[name])(jnp.arange(16, dtype=jnp.uint8)))
    np.testing.assert_array_equal(values.view(np.int32), nf4.CODEBOOK.view(np.int32))


def test_leading_axes_are_separate_tensors():
    weight = jax.random.normal(jax.random.key(0), (2, 3, 16, 64)) * jnp.arange(1, 7.0).reshape(2, 3, 1, 1)
    stacked, alone = quantized.quantize("nf4-double", weight), quantized.quantize("nf4-double", weight[1, 2])
    assert stacked.shape == weight.shape and stacked.size == weight.size
    jax.tree.map(np.testing.assert_array_equal, stacked.part((1, 2)), alone)
    np.testing.assert_array_equal(stacked.dequantize(jnp.float32)[1, 2], alone.dequantize(jnp.float32))


@pytest.mark.parametrize("shape", [(8, 64), (33, 3)])
@pytest.mark.parametrize("double", [False, True])
def test_abstract_has_the_shapes_of_quantize(shape, double):
    real = quantized.quantize(kind_of(double), jnp.ones((2, *shape)))
    abstract = quantized.abstract(kind_of(double), (2, *shape))
    for other in (abstract, jax.eval_shape(abstract.random, jax.random.key(0))):
        assert jax.tree.map(lambda a: (a.shape, a.dtype), real) == jax.tree.map(lambda a: (a.shape, a.dtype), other)


def test_a_large_matrix_is_quantized_in_pieces_to_the_same_bits():
    """More than nf4._PIECE blocks go piece by piece; one piece alone does not."""
    rows = nf4._PIECE
    weight = jax.random.normal(jax.random.key(0), (3 * rows, 64), jnp.bfloat16)
    whole = quantized.encode("nf4", weight).parts
    parts = [quantized.encode("nf4", weight[i * rows : (i + 1) * rows]).parts for i in range(3)]
    for name in ("codes", "absmax"):
        np.testing.assert_array_equal(whole[name], np.concatenate([part[name] for part in parts]))


@pytest.mark.parametrize("number", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused(number):
    """Wherever in a block it is: a maximum of floats loses NaN, in a large matrix, on some CPUs."""
    weight = np.random.default_rng(0).normal(size=(320, 64)).astype(np.float32)
    for place in range(64):
        spoiled = weight.copy()
        spoiled[5, place] = number
        with pytest.raises(ValueError, match="NaN or infinite"):
            quantized.encode("nf4-double", spoiled)


def test_a_tie_is_rounded_downward():
    """As bitsandbytes' comparisons do: what lies in the middle of two codes takes the lower one, what lies above it the upper."""
    middles = (nf4.CODEBOOK[:-1] + nf4.CODEBOOK[1:]) / np.float32(2)
    for values, codes in ((middles, range(15)), (np.nextafter(middles, np.float32(2)), range(1, 16))):
        block = np.concatenate([[np.float32(1)], values, np.zeros(48, np.float32)])  # the largest is one: nothing is scaled
        stored = np.asarray(quantized.encode("nf4", block[None]).parts["codes"])
        np.testing.assert_array_equal(np.stack([stored >> 4, stored & 15], 1).reshape(-1)[1:16], list(codes))
