"""Steps compile for TPU slices that are not there, waste little, and no weight is padded. Needs libtpu, which is no
dependency: `make test-long` gives it this file."""

import importlib.util
import sys

import pytest
from support import ROOT

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
