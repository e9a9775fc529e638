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
