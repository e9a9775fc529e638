"""What kernels of Pallas compute is counted from their shapes."""

import sys
from types import SimpleNamespace

import pytest
from support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_model


def call(name, *shapes):
    parts = [SimpleNamespace(tuple_shapes=(), element_type=11, dimensions=shape) for shape in shapes]
    shape = SimpleNamespace(tuple_shapes=parts)
    return SimpleNamespace(opcode="custom-call", name="custom-call.7", metadata=SimpleNamespace(op_name=f"jit(step)/{name}"), shape=shape)


@pytest.mark.parametrize(("name", "products"), [("mha_forward", 2), ("mha_backward", 5)])
def test_causal_products_of_flash_attention(name, products):
    """Of 2 rows, 512 tokens, 8 heads of 64 numbers."""
    instruction = call(name, (2, 512, 8, 64), (2, 8, 512), (2, 8, 512))
    assert gpu_model._kernel(instruction).work(instruction) == products * 2 * (2 * 8 * 512 * 512 * 64) / 2


def test_states_of_a_scan():
    """Of 2 rows, 512 tokens, 96 channels, 16 states: forward (y, the last state, states kept), backward (du, ..., dA)."""
    forward, backward = (2, 512, 96), (2, 16, 96)
    assert gpu_model._kernel(call("scan_forward")).work(call("scan_forward", forward, backward)) == 2 * 512 * 96 * 16
    last = gpu_model._kernel(call("scan_backward")).work(call("scan_backward", forward, forward, backward))
    assert last == 2 * 512 * 96 * 16
    assert gpu_model._kernel(call("dot_general")) is None


def test_weights_of_a_product_by_codes():
    """256 rows of 8 experts by [96, 128] in NF4, the second of 3 layers: a layer's codes are read once and decoded once for 64 rows."""
    kinds = {"s32": 4, "u8": 6, "bf16": 16, "f32": 11}  # xla.PrimitiveType

    def shape(kind, *dimensions):
        return SimpleNamespace(tuple_shapes=(), element_type=kinds[kind], dimensions=dimensions)

    given = [("s32", 3, 12), ("s32", 1), ("bf16", 256, 128), ("u8", 3, 8, 96, 64), ("f32", 3, 8, 192), ("f32", 16)]
    operands = [SimpleNamespace(shape=shape(*of)) for of in given]
    forward = call("decode_forward")
    forward.shape = shape("bf16", 1, 256, 96)
    flops, moved, weights = gpu_model._grouped(forward, operands)
    assert (flops, weights) == (2 * 256 * 128 * 96, 8 * 96 * 128)
    assert moved == 4 * 37 + 2 * 256 * (128 + 96) + 8 * 96 * 64 + 4 * 8 * 192 + 64
    dense = gpu_model._grouped(forward, operands[:4])
    assert dense[2] == 0.0 and gpu_model._grouped(call("scan_forward"), operands) is None
    operands[2] = SimpleNamespace(shape=shape("bf16", 2048, 128))
    assert gpu_model._grouped(forward, operands)[2] == 4 * weights
