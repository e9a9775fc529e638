"""A learning rate that bf16 weights cannot follow, said before the run: the loss would hardly move, and nothing else would show it."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import Experiment
from moejax.models.build import Model
from moejax.models.layers import INIT_STD
from moejax.terminal import Console
from moejax.training.optimizer import is_decayed
from moejax.training.state import split

SAMPLE = 2**20
"""Weights that are looked at, evenly over all matrices."""
NORMAL_MEDIAN = 0.6745
"""Of the magnitudes of normal numbers, in standard deviations."""
SHARE = 0.25
"""Of the learning rate: the root mean square of Adam's steps where gradients are noise, sqrt((1 - β1) / (1 + β1)) at β1 = 0.9."""


def half_step(weight: float) -> float:
    """Half the distance from a bf16 number of this magnitude to the next: what is smaller is rounded away when it is added."""
    return 2.0 ** (math.floor(math.log2(weight)) - 8) if weight > 0 else 0.0


def median_weight(trainable: Any) -> float:
    """Median magnitude of the matrices' weights, of a sample."""
    flat = jax.tree_util.tree_leaves_with_path(trainable)
    matrices = [leaf for path, leaf in flat if is_decayed(path)]
    every = max(1, sum(leaf.size for leaf in matrices) // SAMPLE)
    sample = jax.jit(lambda leaf: jnp.abs(leaf.reshape(-1)[::every].astype(jnp.float32)))
    return float(np.median(np.concatenate([np.asarray(sample(leaf)) for leaf in matrices])))


def warn(experiment: Experiment, console: Console, model: Model | None = None) -> None:
    """Print a warning where most of a step's changes would be lost in rounding. model: with its weights; None where none are loaded."""
    t = experiment.training
    if experiment.adapter is not None or t.param_dtype != "bfloat16":
        return
    median = NORMAL_MEDIAN * INIT_STD if model is None else median_weight(split(model, full=True)[1])
    needed = half_step(median)
    if SHARE * t.learning_rate >= needed:
        return
    of = f"the median weight, {median:.2g}" + (" (a new model's: no weights are read here)" if model is None else "")
    console.print(
        f"warning: training.learning_rate = {t.learning_rate:g} is too small for weights in bf16: a step changes a weight by at most about "
        f"{t.learning_rate:.2g}, mostly by {SHARE * t.learning_rate:.2g}, and {of}, changes only by more than {needed:.2g}, "
        "half of its bf16 step. The rest is rounded away, and the loss hardly moves (update_norm is what is left). "
        "training.param_dtype=bfloat16_stochastic keeps it on average, in the same memory; training.param_dtype=float32 keeps it "
        "exactly, in twice the memory",
        soft_wrap=True,
    )  # fmt: skip
