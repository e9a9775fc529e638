"""Makes equal training steps one function in the tests' processes, so that jax traces, lowers and compiles each once.

Tracing a step takes longer than running a tiny one; a hundred tests train. What is shared depends on its arguments only.
"""

from functools import cache

from moejax import device
from moejax.profiling import capture
from moejax.training import optimizer, step

OTHERS = {"steps": 1, "epochs": None, "eval_every": None, "gradient_accumulation": 1}
"""What a training section says that neither schedule nor optimizer look at."""

_schedule, _optimizer = cache(optimizer.make_schedule), cache(optimizer.make_optimizer)


def make_schedule(config, steps):
    return _schedule(config.model_copy(update=OTHERS), 1 if config.schedule == "constant" else steps)


def make_optimizer(config, schedule):
    return _optimizer(config.model_copy(update=OTHERS), schedule)


optimizer.make_schedule, optimizer.make_optimizer = make_schedule, make_optimizer
step.make_train_step, step.make_eval_step = cache(step.make_train_step), cache(step.make_eval_step)

device.peak_flops, device.peak_bytes_per_second = cache(device.peak_flops), cache(device.peak_bytes_per_second)
"""A machine's peaks are measured by running it at its peak: no run here needs figures of its own."""

_compile_profiled = capture.compile_profiled


def compile_profiled(lowering, options=None):
    """jax keeps an equal step's program. If that came from the folder of compiled ones, a trace would not hold its instructions."""
    lowering._lowering._executable = None
    return _compile_profiled(lowering, options)


capture.compile_profiled = compile_profiled
