"""Steps compile for TPU slices that are not there, waste little, and no weight is padded. Needs libtpu, which is no
dependency: `make test-long` gives it this file."""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding
from support import ROOT

from moejax import tpus
from moejax.models.ops import linear, quantized
from moejax.profiling import layouts
from moejax.training import absent

sys.path[:0] = [str(ROOT / "benchmarks")]

import tpu_programs  # noqa: E402

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (make .venv-aot-tpu/.installed)"),
]
# A chip's rows and their tokens; odd multiples of 16 are the least that batching allows.
GRID = [
    ("olmoe_1b_7b", "v5e-1", None, 2, 528),
    ("mixtral_8x7b_v5e8", "v5e-8", "experts", 1, 368),
    ("mixtral_8x7b_v5e8", "v5e-8", "spread", 8, 128),
    ("qwen3_30b_a3b_v5e8", "v5e-8", "experts", 1, 1040),
]


@pytest.mark.parametrize(("name", "target", "weights", "rows", "row_tokens"), GRID)
def test_a_step_compiles_and_wastes_nothing(name, target, weights, rows, row_tokens):
    """Layers are scanned: two compile as all do. No buffer of more than 16 MB takes a tenth more than its numbers."""
    told = tpu_programs.compiled(tpu_programs.Case(name, target, weights, rows, row_tokens), layers=2)
    assert told["arguments_gb"] < told["peak_gb"] < told["usable_gb"]
    assert told["flops_ratio"] < 1.5 and told["floor_gb"] < told["moved_gb"] < 4 * told["floor_gb"]
    assert told["padded"] == []


@pytest.mark.parametrize(("kind", "shape"), [("mxfp4", (4, 2880, 2880)), ("nf4-double", (8, 2048, 1024))])
def test_no_buffer_of_a_4_bit_weight_is_padded_and_no_table_is_read(kind, shape):
    """gpt-oss's and OLMoE's experts, one a turn of a loop: dequantized and multiplied, both ways."""
    device = SingleDeviceSharding(absent.device(tpus.find("v5e-1").chip))
    weight, rows = quantized.abstract(kind, shape, quantized.layout("TPU v5 lite")), jax.ShapeDtypeStruct((256, shape[2]), jnp.bfloat16)

    def step(weight, rows):
        def one(total, e):
            out, pull = jax.vjp(lambda x: linear.with_frozen(linear.matmul, "dequant", linear.OfLayer(weight, e), x), rows)
            return total + pull(out)[0], None

        return jax.lax.scan(one, rows, jnp.arange(shape[0]))[0]

    operands = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), (weight, rows))
    text = jax.jit(step).lower(*operands).compile().as_text()
    assert "dequant" in text and " gather(" not in text
    assert layouts.padded(text, at_least=10**6) == []
