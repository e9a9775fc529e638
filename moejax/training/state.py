"""From an experiment to a model and its first training state."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax
from flax import nnx

from moejax.config import Experiment
from moejax.errors import UserError
from moejax.models.build import Model
from moejax.training.step import Objective, TrainState


def split(model: Model, full: bool) -> tuple[Any, nnx.State, nnx.State]:
    """graphdef, trainable, frozen. LoRAParam is a Param, so an adapter's run has nothing else among its Params."""
    kind = nnx.Param if full else nnx.LoRAParam
    parts: Any = nnx.split(model, kind, ...)
    graphdef, trainable, frozen = parts
    return graphdef, trainable, frozen


def objective(experiment: Experiment, graphdef: Any) -> Objective:
    t = experiment.training
    if t.remat == "auto":
        raise UserError("training.remat = auto is resolved by a training run only: set none, dots or full here")
    return Objective(
        graphdef,
        full=experiment.adapter is None,
        remat=t.remat,
        label_smoothing=t.label_smoothing,
        aux_loss_coef=experiment.model.aux_loss_coef,
        chunk_tokens=t.loss_chunk_tokens,
        dropout=0.0 if experiment.adapter is None else experiment.adapter.dropout,
        stochastic=t.param_dtype == "bfloat16_stochastic",
    )


def initial_state(trainable: nnx.State, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(trainable, optimizer.init(trainable), jnp.zeros((), jnp.int32))
