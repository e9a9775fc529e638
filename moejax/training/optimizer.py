"""AdamW or Adafactor with clipping and a learning-rate schedule, from the config."""

from __future__ import annotations

from typing import Any

import jax
import optax

from moejax.config import TrainingConfig

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
    """AdamW (decoupled decay, as torch's) behind clipping by the global norm; moments in the weights' dtype (fp32 for LoRA).

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
    else:
        adam = optax.scale_by_adam(config.betas[0], config.betas[1], config.eps)
        rule = optax.chain(adam, decay, optax.scale_by_learning_rate(schedule))
    return rule if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)
