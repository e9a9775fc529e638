"""A compile that fails is told in one message: what was compiled, for which device, the compiler's first line, and what to try."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax

from moejax import installation
from moejax.config import ROW_MULTIPLE, Experiment
from moejax.errors import UserError, first_line
from moejax.estimator.units import counted

_TOOLS = f"the compiler's own tools, with jax's plugin in jaxlib's version: {installation.for_extra('cuda12')}"
_WHAT_TO_TRY = (
    ("output tile sizes", f"rows of a multiple of {ROW_MULTIPLE} tokens, a single row (data.batch_rows=1), or another version of jax"),
    ("RESOURCE_EXHAUSTED", "fewer rows (data.batch_rows), shorter ones, or training.remat=full"),
    ("ptxas", _TOOLS),
    ("libdevice", _TOOLS),
)
_ELSE = "another number of rows (data.batch_rows) or another version of jax (pip install -U jax), and report the message"


def step_of(experiment: Experiment, rows: int, row_tokens: int) -> str:
    """The name of an experiment's step in a message."""
    micro = experiment.training.gradient_accumulation
    return f"the step of {experiment.name} ({'' if micro == 1 else f'{micro} x '}{counted(rows, 'row')} x {row_tokens} tokens)"


def advice(error: BaseException) -> str:
    """What to try about an error of XLA's."""
    return next((advice for mark, advice in _WHAT_TO_TRY if mark in str(error)), _ELSE)


@contextmanager
def told(what: str, device: str) -> Iterator[None]:
    """Around the lowering and compiling of a program. Raises UserError for what the compiler raises."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise UserError(f"{what} does not compile for {device}: {first_line(error)}. Try {advice(error)}") from error
