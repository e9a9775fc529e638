"""AdamW or Adafactor with clipping and a learning-rate schedule, from the config."""

from __future__ import annotations

import optax

from moejax.config import TrainingConfig


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
    """
    if config.optimizer == "adafactor":
        rule = optax.adafactor(schedule, multiply_by_parameter_scale=False, weight_decay_rate=config.weight_decay or None)
    else:
        rule = optax.adamw(schedule, b1=config.betas[0], b2=config.betas[1], eps=config.eps, weight_decay=config.weight_decay)
    return rule if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)
