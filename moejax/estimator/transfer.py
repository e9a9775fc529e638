"""Coefficients carried to a GPU that nobody measured, by the two GPUs' data-sheet figures alone.

What bounds t0 is not known from outside: bandwidth if it is dequantizing and the optimizer, the host if it is launching kernels
(of 1.1 s that a Mixtral's forward pass takes on the A40 at batch 1, the expert kernels of Figure 6 are 0.47 s). So three rules:

    optimistic   t0 by bandwidth, u and v by peak FLOP/s
    host-bound   t0 as it is, u and v by peak FLOP/s
    as it is     nothing is faster
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from moejax.estimator.least_squares import FloatArray
from moejax.gpus import GPU

Rule = Literal["optimistic", "host-bound", "as it is"]
RULES: tuple[Rule, ...] = get_args(Rule)


def factors(source: GPU, target: GPU, rule: Rule) -> FloatArray:
    """[3]: what t0, u and v are multiplied by. A slower GPU is slower by every rule but "as it is"."""
    computing = source.flops_per_second / target.flops_per_second
    reading = source.bytes_per_second / target.bytes_per_second
    return {
        "optimistic": np.array([reading, computing, computing]),
        "host-bound": np.array([max(1.0, reading), computing, computing]),
        "as it is": np.ones(3),
    }[rule]
