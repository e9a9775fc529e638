"""MXFP4 against transformers 5.24's own dequantization, to the bit (tests/oracles/mxfp4.py), and against ml_dtypes' e2m1 and e8m0."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import read_vectors

from moejax.models.ops import mxfp4, quantized


@pytest.mark.parametrize("layout", ("halves", "pairs"))
@pytest.mark.parametrize("case", ["every", "gpt_oss", "one_block", "three_blocks"])
def test_values_are_transformers_to_the_bit(case, layout):
    """Every byte under every scale but NaN, what overflows and the smallest numbers too; and the checkpoint's bytes come back."""
    known = read_vectors("mxfp4")
    blocks, scales = known[f"{case}/blocks"], known[f"{case}/scales"]
    experts, rows, count, _ = blocks.shape
    held = quantized.abstract("mxfp4", (experts, rows, 32 * count), layout)
    parts = {"codes": blocks.reshape(experts, -1), "scales": scales.reshape(experts, -1)}
    tensor = held.with_parts({name: jnp.asarray(held.pack(name, part)) for name, part in parts.items()})
    assert tensor.codes.shape == (experts, rows, 16 * count) and tensor.scales.shape == (experts, rows, count)
    for dtype, bits in (("float32", np.int32), ("bfloat16", np.int16)):
        value = jax.jit(quantized.dequantized, static_argnums=1)(tensor, jnp.dtype(dtype))
        np.testing.assert_array_equal(np.asarray(value).view(bits), known[f"{case}/{dtype}"])
    for name, part in tensor.canonical().parts.items():
        np.testing.assert_array_equal(part, parts[name])


def test_what_is_written_is_the_nearest_code():
    """Every multiple of an eighth of a scale: the nearest value, of two the one whose last bit is 0, above the largest the largest."""
    grid = np.concatenate([mxfp4.CODEBOOK, -mxfp4.CODEBOOK])
    numbers = np.arange(-63, 64) / np.float32(8)
    for exponent in (-126, -20, 0, 100):
        rows = np.zeros((len(numbers), 32), np.float32)
        rows[:, 0], rows[:, 1] = 4, numbers  # the largest is 4 to 8: a scale of 1
        canonical = quantized.encode("mxfp4", np.ldexp(rows, exponent))
        assert set(canonical.parts["scales"]) == {exponent + 127}
        found = canonical.parts["codes"].reshape(len(numbers), 16)[:, 0] >> 4
        distances = np.sort(np.abs(grid[:8, None] - np.abs(numbers)), axis=0)
        np.testing.assert_array_equal(np.abs(grid[found] - numbers), distances[0])
        ties = distances[0] == distances[1]
        assert ties.sum() == 14 and (found[ties] % 2 == 0).all()
        np.testing.assert_array_equal(found >> 3, np.signbit(numbers))


def test_quantizing_again_changes_nothing():
    """Where some weight of each block is the largest code or its half, the scale is found again, and every code."""
    rng = np.random.default_rng(0)
    codes, scales = rng.integers(0, 256, (6, 3, 16), np.uint8), rng.integers(3, 250, 18).astype(np.uint8)
    codes[..., 5] = 0x7E  # -4 and 6
    canonical = quantized.Canonical("mxfp4", (6, 96), {"codes": codes.reshape(-1), "scales": scales})
    again = quantized.encode("mxfp4", canonical.tensor().dequantize(jnp.float32))
    for name, part in again.parts.items():
        np.testing.assert_array_equal(part, canonical.parts[name])


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused(number):
    weight = np.ones((4, 64), np.float32)
    weight[3, 40] = number
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantized.encode("mxfp4", weight)


def test_rows_of_no_whole_blocks_are_refused():
    for make in (lambda: quantized.abstract("mxfp4", (4, 48)), lambda: quantized.encode("mxfp4", np.ones((4, 48)))):
        with pytest.raises(ValueError, match=r"a row of 48 weights in MXFP4: expected a multiple of 32"):
            make()


def test_is_finite_tells_every_overflow():
    """By the values themselves: the last three scales with each code as a block's largest."""
    codes = np.zeros((256, 8, 16), np.uint8)
    codes[..., 7] = np.arange(8) << 4
    scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 8, 1)
    tensor = quantized.Canonical("mxfp4", (256, 256), {"codes": codes.reshape(-1), "scales": scales.reshape(-1)}).tensor()
    values = np.asarray(tensor.dequantize(jnp.float32)).reshape(256, 8, 32)
    expected = np.isfinite(values).all(-1)
    expected[255] = False
    np.testing.assert_array_equal(mxfp4.is_finite(codes, scales), expected)
    assert not expected[253, 6] and expected[253, 5] and expected[252].all()
