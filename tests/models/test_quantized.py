"""4-bit weights in memory: whatever the shape and the layout, the canonical bytes come back, and mean the same numbers to the bit."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.models.ops import linear, mxfp4, nf4, quantized, tiles
from moejax.models.ops.quantized import KINDS

# Rows of whole blocks that split on one, between two (2880, 10944: an odd number of them), within one, on half a byte, and of one weight.
SHAPES = [(4, 128), (2, 256), (3, 64), (2, 2880), (1, 10944), (5, 96), (3, 70), (7, 66), (3, 130), (4, 77), (33, 3), (5, 1), (1, 1), (1, 2)]
# As columns: of one block, of some whose rows are folded and that have three scales of scales a row, of an odd number, of many.
WIDE = [(128, 64), (256, 768), (136, 320), (129, 1024)]
EACH = [(kind, shape) for kind in KINDS for shape in SHAPES if shape[1] % KINDS[kind].block == 0 or not KINDS[kind].rows]
LAID = [(*each, layout) for each in EACH for layout in ("halves", "pairs")] + [
    (kind, shape, layout) for kind in KINDS for shape in WIDE for layout in ("columns", "sixteens")
]


def drawn(kind, shape, leading=()):
    """Canonical parts of any bits, an odd matrix's last nibble too."""
    rng = np.random.default_rng([*shape, *leading])
    made = {}
    for name, (dims, dtype) in KINDS[kind].parts((*leading, *shape), canonical=True).items():
        bytes_ = rng.integers(0, 253 if name == "scales" else 256, dims, np.uint8)
        made[name] = bytes_ if dtype == "uint8" else np.asarray(rng.normal(size=dims), np.float32)
    return quantized.Canonical(kind, (*leading, *shape), made)


def laid(canonical, layout):
    """As it lies in memory in a layout."""
    held = quantized.abstract(canonical.kind, canonical.shape, layout)
    return held.with_parts({name: jnp.asarray(held.pack(name, part)) for name, part in canonical.parts.items()})


def flat_values(canonical):
    """fp32: what the canonical parts of one matrix mean, weight by weight in a row."""
    parts, n = canonical.parts, int(np.prod(canonical.shape))
    if canonical.kind == "mxfp4":  # by others' formats of 4 and 8 bits; a power of two out of fp32's range is fp32's
        codes = np.stack([parts["codes"] & 15, parts["codes"] >> 4], axis=-1).reshape(-1).view(jnp.float4_e2m1fn).astype(np.float64)
        scales = parts["scales"].view(jnp.float8_e8m0fnu).astype(np.float64)
        return (codes * np.repeat(scales, mxfp4.BLOCK)).astype(np.float32).reshape(canonical.shape)
    scales = parts["absmax"]
    if "offset" in parts:
        nested = np.repeat(parts["nested_absmax"], nf4.NESTED_BLOCK)[: scales.size]
        scales = nf4.DYNAMIC_MAP[scales] * nested + parts["offset"]
    codes = np.stack([parts["codes"] >> 4, parts["codes"] & 15], axis=-1).reshape(-1)[:n]
    return (nf4.CODEBOOK[codes] * np.repeat(scales, nf4.BLOCK)[:n]).reshape(canonical.shape)


@pytest.mark.parametrize(("kind", "shape", "layout"), [each for each in LAID if each[0] != "nf4"])
def test_canonical_bytes_come_back(kind, shape, layout):
    half = shape[0] * -(-shape[1] // 2)
    for leading in ((), (2, 3)):
        canonical = drawn(kind, shape, leading)
        tensor = laid(canonical, layout)
        assert tensor.layout == layout
        assert tensor.shape == (*leading, *shape) and tensor.is_whole and tensor.codes.size == np.prod(leading, dtype=int) * half
        back = tensor.canonical()
        assert (back.kind, back.shape) == (canonical.kind, canonical.shape)
        for name, part in canonical.parts.items():
            np.testing.assert_array_equal(back.parts[name], part, strict=True)
        for name, part in canonical.parts.items():
            own = part.copy()
            packed = tensor.pack(name, own, in_place=True)
            np.testing.assert_array_equal(packed, getattr(tensor, name))
            if tensor.packs_in_place(name):
                np.testing.assert_array_equal(own.reshape(packed.shape), packed)


@pytest.mark.parametrize(("kind", "shape"), [*EACH, *((kind, shape) for kind in KINDS for shape in WIDE)])
def test_values_are_those_of_the_flat_form_to_the_bit(kind, shape):
    """In every layout, of NF4 by both look-ups, as fp32 and bf16."""
    canonical = drawn(kind, shape)
    expected = flat_values(canonical)
    forms = [mxfp4.dequantize] if kind == "mxfp4" else [partial(nf4.dequantize, look_up=look_up) for look_up in nf4.LOOK_UPS.values()]
    held = [laid(canonical, layout) for of, at, layout in LAID if (of, at) == (kind, shape)]
    values = jax.jit(lambda held: [[form(t, dtype) for dtype in (jnp.float32, jnp.bfloat16)] for t in held for form in forms])(held)
    assert len(values) == len(held) * len(forms) > 0
    for found in values:
        np.testing.assert_array_equal(np.asarray(found[0]).view(np.int32), expected.view(np.int32))
        np.testing.assert_array_equal(np.asarray(found[1], np.float32), np.asarray(expected.astype(jnp.bfloat16), np.float32))


@pytest.mark.parametrize(
    ("kind", "shape", "layout"),
    [*(pytest.param(kind, shape, layout, marks=[] if shape in ((2, 192), (3, 5)) and layout == "halves" else pytest.mark.long)
       for layout in ("halves", "pairs") for kind, shape in
       (*(("nf4-double", shape) for shape in ((4, 128), (2, 192), (3, 70), (3, 5))), ("mxfp4", (4, 96)))),
     ("nf4-double", (128, 192), "columns"), ("mxfp4", (128, 96), "columns")],
)  # fmt: skip
def test_a_stack_is_its_matrices(kind, shape, layout):
    """Sliced by index, by a scan over layers, as a layer of a whole stack; and a product's gradient is the matrix itself."""
    canonical = drawn(kind, shape, (2, 3))
    if kind == "mxfp4":
        canonical.parts["scales"][...] = 127 + canonical.parts["scales"] % 4  # sums of what is near
    stacked = laid(canonical, layout)
    matrices = {
        at: flat_values(quantized.Canonical(canonical.kind, shape, {name: part[at] for name, part in canonical.parts.items()}))
        for at in np.ndindex(2, 3)
    }
    whole = np.stack([matrices[at] for at in np.ndindex(2, 3)]).reshape(2, 3, *shape)
    scanned = jax.jit(lambda t: jax.lax.scan(lambda c, layer: (c, layer.dequantize(jnp.float32)), 0, t)[1])(stacked)
    for found in (jax.jit(lambda t: t.dequantize(jnp.float32))(stacked), scanned):
        np.testing.assert_array_equal(found, whole)

    def product(x, layer, expert):
        weight = linear.part(linear.OfLayer(stacked, layer), expert)
        return linear.with_frozen(linear.matmul, "dequant", weight, x).sum()

    gradient = jax.jit(jax.grad(jax.checkpoint(product)))(jnp.ones(shape[1]), jnp.int32(1), jnp.int32(2))
    np.testing.assert_allclose(gradient, matrices[1, 2].sum(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(stacked.part((1, 2)).dequantize(jnp.float32), matrices[1, 2])


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_parts(kind):
    for shape in (shape for of, shape in EACH if of == kind):
        tensor = quantized.abstract(kind, (2, *shape))
        assert sum(KINDS[kind].nbytes((2, *shape)).values()) == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tensor))
    large = (4096, 4096)
    assert sum(KINDS[kind].nbytes(large).values()) / np.prod(large) == pytest.approx(KINDS[kind].bytes_per_weight, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tpu_pads_no_part(kind):
    """Of matrices of published models; as a GPU has them the scales are padded up to eightfold."""
    assert quantized.layout("TPU v5 lite") == "columns" and {quantized.layout(p) for p in ("cpu", "gpu", "NVIDIA L4")} == {"halves"}
    for out, inner in ((1024, 2048), (2048, 1024), (768, 2048), (2048, 768), (14336, 4096), (4096, 14336), (2880, 2880), (512, 2048)):
        parts = KINDS[kind].parts((out, inner), quantized.abstract(kind, (out, inner), "columns").layout)
        taken = {name: tiles.filled(*shape) / np.prod(shape) for name, (shape, _) in parts.items() if len(shape) == 2}
        assert set(KINDS[kind].large) <= set(taken) and max(taken.values()) < 1.1, (out, inner, taken)
    assert quantized.abstract(kind, (8, 4096), "columns").layout == "halves"
