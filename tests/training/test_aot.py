"""Compiling the full step for a GPU that is not there (extra `aot`)."""

import importlib.util

import pytest
from support import ROOT

from models.config import PRESETS
from moejax import config
from moejax.errors import UserError
from moejax.training import aot

EXPERIMENT = config.load(ROOT / "configs" / "mixtral_8x7b_cs_sparse.yaml")


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason="the extra `aot` is not installed")
def test_the_8x7b_step_compiles_for_an_h100_within_its_memory():
    for rows in (1, 8):
        compiled = aot.compile_step(EXPERIMENT, PRESETS["mixtral-8x7b"], rows=rows, row_tokens=512, gpu="H100")
        assert 27.2e9 < compiled.peak_bytes < (36 + 0.45 * rows) * 1e9


def test_the_step_compiles_for_this_machine():
    compiled = aot.compile_step(EXPERIMENT, PRESETS["mixtral-tiny"], rows=2, row_tokens=64, gpu=None)
    assert compiled.peak_bytes > compiled.argument_bytes > 0


def test_unknown_gpu():
    with pytest.raises(UserError, match="'H1000' is unknown here: expected one of H100"):
        aot.device("H1000")
