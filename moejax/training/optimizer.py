"""AdamW, in 8 bits too, Adafactor or Lion with clipping and a learning-rate schedule, from the config."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from moejax.config import Experiment, TrainingConfig
from moejax.estimator import sizes
from moejax.models.config import Architecture
from moejax.training.adam8 import adamw_8bit

_UNDECAYED = ("bias", "dt_bias", "a_log", "d")
"""Besides norms: biases, as transformers' Trainer leaves them out; A_log and D, which Mamba marks `_no_weight_decay`."""


def is_decayed(path: tuple[Any, ...]) -> bool:
    """Whether the weight at this path of a model's state is a matrix (a table, a convolution), which weight decay is for."""
    names = [str(getattr(part, "key", getattr(part, "name", part))) for part in path]
    names = [name for name in names if name != "value"]  # of the variable that holds the array
    return names[-1] not in _UNDECAYED and not any(name.endswith("norm") for name in names)


def make_schedule(config: TrainingConfig, steps: int) -> optax.Schedule:
    """Learning rate per optimizer step: linear warm-up from zero, then cosine, linear or constant to the last step."""
    peak, end = config.learning_rate, config.learning_rate * config.min_learning_rate_ratio
    decay_steps = max(1, steps - config.warmup_steps)
    if config.schedule == "constant":
        decay: optax.Schedule = optax.constant_schedule(peak)
    elif config.schedule == "linear":
        decay = optax.linear_schedule(peak, end, decay_steps)
    else:
        decay = optax.cosine_decay_schedule(peak, decay_steps, alpha=config.min_learning_rate_ratio)
    if not config.warmup_steps:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, config.warmup_steps), decay], [config.warmup_steps])


def make_optimizer(config: TrainingConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW (decoupled decay, as torch's) behind clipping by the global norm; moments in the weights' dtype (fp32 for LoRA), or in bf16,
    which the step then has to widen and round (`Objective.stochastic`). In 8 bits: `adam8`. Lion: optax's, with one moment.

    Adafactor (optax's, without its own scaling by the parameters' size): second moments as a row and a column per matrix, no first.
    A step takes learning rate · weight_decay of each weight that `weight_decay_on` names, with either.
    """

    def decayed(weights: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: config.weight_decay_on == "all" or is_decayed(path), weights)

    decay = optax.add_decayed_weights(config.weight_decay, decayed)
    if config.optimizer == "adafactor":
        # `optax.adafactor`, which would decay by weight_decay itself at every step, whatever the learning rate is.
        clipped = optax.chain(optax.clip_by_block_rms(1.0), decay)
        rule = optax.chain(optax.scale_by_factored_rms(), clipped, optax.scale_by_learning_rate(schedule))
    elif config.optimizer == "adamw_8bit":
        rule = adamw_8bit(schedule, *config.betas, config.eps, config.weight_decay, decayed)
    else:
        scaled = optax.scale_by_lion(*config.betas) if config.optimizer == "lion" else optax.scale_by_adam(*config.betas, config.eps)
        rule = optax.chain(scaled, decay, optax.scale_by_learning_rate(schedule))
    if config.moments_dtype is not None:
        rule = _begun_in(jnp.dtype(config.moments_dtype), rule)
    return rule if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)


def kept_wide(experiment: Experiment, config: Architecture) -> list[str]:
    """A line where moments in 8 bits were asked for and some stay in fp32."""
    if experiment.training.optimizer != "adamw_8bit":
        return []
    trained = [s for s in sizes.stored(experiment, config) if s.trained]
    wide = [s for s in trained if not sizes.in_8_bits(s.size, s.parameters)]
    if not wide:
        return []
    count, every = (sum(s.parameters for s in part) for part in (wide, trained))
    share = sum(s.size for s in wide) / sum(s.size for s in trained)
    return [
        f"adamw_8bit: {count:,} of {every:,} trained tensors, {share:.2%} of what is trained, have fewer than {sizes.SMALLEST_8BIT:,} "
        "elements: their moments are in fp32"
    ]  # fmt: skip


def _begun_in(dtype: Any, rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """The rule, whose moments begin in this dtype: as those of weights in it would, none of which is made."""

    def init(weights: Any) -> optax.OptState:
        return rule.init(jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, dtype), weights))

    return optax.GradientTransformation(init, rule.update)
