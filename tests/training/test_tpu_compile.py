"""Steps compile for TPU slices that are not there, waste little, and no array is padded. Needs libtpu, which is no
dependency: `make test-long` gives it this file."""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec, SingleDeviceSharding
from support import ROOT

from moejax import tpus
from moejax.models.ops import host, linear, quantized
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
    ("gpt_oss_20b", "v5e-4", "experts", 2, 512),
]


@pytest.mark.parametrize(("name", "target", "weights", "rows", "row_tokens"), GRID)
def test_a_step_compiles_and_wastes_nothing(name, target, weights, rows, row_tokens):
    """Layers are scanned: two compile as all do. No buffer of more than 16 MB takes a tenth more than its numbers."""
    more = tpu_programs.R8 if name == "gpt_oss_20b" else ()
    told = tpu_programs.compiled(tpu_programs.Case(name, target, weights, rows, row_tokens, overrides=more), layers=2)
    assert told["arguments_gb"] < told["peak_gb"] < told["usable_gb"]
    assert told["flops_ratio"] < 1.5 and told["floor_gb"] < told["moved_gb"] < 4 * told["staged_gb"]
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


@pytest.mark.parametrize("kind", ["mxfp4", "nf4-double"])
@pytest.mark.parametrize("by", ["layer", "experts"])
def test_weights_in_the_hosts_memory_come_part_by_part(kind, by):
    """Of a stack of layers a layer, or an expert; the compiler lays nothing anew and copies no whole stack."""
    device = absent.device(tpus.find("v5e-1").chip)
    there, pinned = SingleDeviceSharding(device), absent.Pinned(Mesh(np.array([device]), ("device",)), PartitionSpec())
    layers, experts = 3, 4
    weight = quantized.abstract(kind, (layers, experts, 2048, 2048), quantized.layout("TPU v5 lite"))
    weight = weight.in_host(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=pinned))
    in_host = host.nbytes(weight)
    weight = jax.tree.map(lambda a: a if host.is_host(a) else jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=there), weight)

    def product(weight, x):
        return jnp.einsum("...ti,...oi->...to", x, linear.dequantized(weight, x.dtype, "dequant"))

    def step(weight, x):
        def layer(x, number):
            own = linear.OfLayer(weight, number)
            if by == "layer":
                return product(own, x), None
            return jax.lax.map(lambda e: product(linear.part(own, e), jax.lax.dynamic_index_in_dim(x, e, keepdims=False)), numbers), None

        numbers = jnp.arange(experts)
        return jax.lax.scan(layer, x, jnp.arange(layers))[0]

    rows = jax.ShapeDtypeStruct((experts, 128, 2048), jnp.bfloat16, sharding=there)
    program = jax.jit(step).lower(weight, rows).compile()
    uses = [line for line in program.as_text().splitlines() if "S(5)" in line and (" copy" in line or "-start(" in line)]
    assert uses and all(" dynamic-slice-start(" in line for line in uses)
    memory = program.memory_analysis()
    assert (memory.host_argument_size_in_bytes, memory.host_temp_size_in_bytes) == (in_host, 0)


@pytest.mark.parametrize(("count", "size"), [(65536, 2048), (65536, 2880), (65537, 2048)])
def test_rows_of_a_table_in_the_hosts_memory(count, size):
    """Tile by tile; as a whole where the last tile is not full: a part of a tile does not compile."""
    device = absent.device(tpus.find("v5e-1").chip)
    pinned = absent.Pinned(Mesh(np.array([device]), ("device",)), PartitionSpec())
    table = jax.ShapeDtypeStruct((count, size), jnp.bfloat16, sharding=pinned)
    index = jax.ShapeDtypeStruct((64,), jnp.int32, sharding=SingleDeviceSharding(device))
    program = jax.jit(host.rows).lower(table, index).compile()
    by_tiles = " dynamic-slice-start(" in program.as_text() and program.memory_analysis().temp_size_in_bytes < 2**20
    assert by_tiles == (count % host.TILE == 0)
