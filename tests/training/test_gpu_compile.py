"""The real steps compile for GPUs that are not there, at the lengths that batches have; a compile that fails is one message. Needs the
extra `aot` (`make test` gives it this file in an environment of its own)."""

import importlib.util

import numpy as np
import pytest
from support import ROOT

from moejax import config
from moejax.data.batching import Batches
from moejax.data.tokenize import Query
from moejax.errors import UserError
from moejax.estimator import sizes
from moejax.training import program
from moejax.training.program import TrainProgram

needs_aot = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="the extra `aot` is not installed (BUILD.md)"
)
DEPTH = "model.overrides.num_layers=2"  # layers are scanned: two compile as 32 do


def experiment(name, *overrides):
    return config.load(ROOT / "configs" / f"{name}.yaml", [DEPTH, *overrides])


def padded(e, longest):
    """Tokens of the rows that `pad_longest` makes of a batch whose longest query has so many."""
    section = e.data.model_copy(update={"batching": "pad_longest", "batch_rows": 2})
    queries = [Query.after(1, np.ones(n, np.int32)) for n in (longest, 7)]
    return next(Batches(queries, section, 0).iterate(0)).tokens.shape[1]


@needs_aot
@pytest.mark.parametrize(
    ("name", "gpu", "rows", "longest", "most_bytes"),
    [("mixtral_8x7b_cs_sparse", "H100", 2, 372, 4e9), ("mixtral_8x7b_cs_sparse", "L4", 8, 75, 4e9),
     ("blackmamba_2.8b_cs_sparse", "H100", 1, 130, 4e9), ("blackmamba_2.8b_cs_sparse", "L4", 2, 365, 4e9),
     ("qwen3_30b_a3b_48gb", "A40", 2, 372, 4.6e9)],  # of it 1.2 GB are a layer's dequantized experts
)  # fmt: skip
def test_the_step_compiles_at_any_length_of_a_query(name, gpu, rows, longest, most_bytes):
    e = experiment(name)
    compiled = TrainProgram(e, sizes.architecture_of(e), gpu=gpu).compile(rows, padded(e, longest))
    assert compiled.argument_bytes < compiled.peak_bytes < most_bytes


@needs_aot
def test_a_product_without_tiles_of_tritons_is_cublas_and_a_compile_that_fails_is_one_message(monkeypatch):
    """Two rows of 372 tokens, which no batch has: what fails, for which device, and what to try."""
    e = experiment("mixtral_8x7b_cs_sparse")
    made = TrainProgram(e, sizes.architecture_of(e), gpu="H100")
    assert made.compile(2, 372).peak_bytes < 4e9
    monkeypatch.setattr(program, "CUBLAS", None)
    with pytest.raises(UserError) as told:
        TrainProgram(e, sizes.architecture_of(e), gpu="H100").compile(2, 372)
    message = str(told.value)
    assert message.startswith(f"the step of {e.name} (2 rows x 372 tokens) does not compile for NVIDIA H100 80GB HBM3: INTERNAL: ")
    assert "\n" not in message and "Try rows of a multiple of 16 tokens" in message
