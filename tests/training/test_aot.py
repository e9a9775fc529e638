"""Compiling the full step for this machine, and what is said where that fails (for GPUs: test_gpu_compile.py)."""

import jax
import pytest
from support import ROOT

from moejax import config
from moejax.errors import UserError
from moejax.models.config import PRESETS
from moejax.training import aot

EXPERIMENT = config.load(ROOT / "configs" / "mixtral_8x7b_cs_sparse.yaml")


def test_the_step_compiles_for_this_machine():
    compiled = aot.compile_step(EXPERIMENT, PRESETS["mixtral-tiny"], rows=2, row_tokens=64, gpu=None)
    assert compiled.peak_bytes > compiled.argument_bytes > 0


def test_unknown_gpu():
    with pytest.raises(UserError, match=r"'H1000' is unknown here: expected one of .*H100"):
        aot.device("H1000")


class Refuses:
    """A lowering that the compiler does not take."""

    def __init__(self, message):
        self.message = message

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


@pytest.mark.parametrize(
    ("message", "advice"),
    [("INTERNAL: Couldn't find output tile sizes that satisfy hlo: %dot\nmore", "rows of a multiple of 16 tokens"),
     ("RESOURCE_EXHAUSTED: Out of memory while compiling", "fewer rows (data.batch_rows)"),
     ("NOT_FOUND: Couldn't find a suitable version of ptxas", "the compiler's own tools"),
     ("UNIMPLEMENTED: custom call", "report the message")],
)  # fmt: skip
def test_a_compile_that_fails_is_one_message(message, advice):
    with pytest.raises(UserError) as told:
        aot.compile_step(
            EXPERIMENT, PRESETS["mixtral-tiny"], rows=2, row_tokens=64, gpu=None, compiler=lambda lowering: Refuses(message).compile()
        )
    said = str(told.value)
    assert said.startswith("the step of mixtral_8x7b_cs_sparse (2 rows x 64 tokens) does not compile for cpu: " + message.splitlines()[0])
    assert advice in said and "\n" not in said
