"""Tracing some steps of a run with jax's profiler, where TensorBoard finds them: RUN/plugins/profile/<time>/*.xplane.pb."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from moejax import installation
from moejax.errors import UserError, first_line
from moejax.profiling import xplane
from moejax.profiling.breakdown import Breakdown, analyze

STEP_NAME = "train"  # TensorBoard's name for the step markers


class Capture:
    """The traced steps `first` to `last` of a run. Without any (`steps` = 0), nothing is done and nothing is written.

    after: the last step that was done before this process began (0, or where a run resumes). A process's first step compiles: if it is
    the first traced one, or later than that, nothing is traced.
    """

    def __init__(self, folder: Path, first: int, steps: int, after: int = 0):
        self.folder, self.first, self.last = folder, first, first + steps - 1
        self.missed = steps > 0 and after + 1 >= first
        self.done = 0  # traced steps
        self._tracing = False

    def covers(self, step: int) -> bool:
        """Whether this step is to be traced."""
        return not self.missed and self.first <= step <= self.last

    def disturbs(self, step: int) -> bool:
        """Whether tracing takes time in this step: it is traced, or the trace is written in it."""
        return not self.missed and self.first <= step <= self.last + 1 and self.first <= self.last

    @property
    def complete(self) -> bool:
        return self.last >= self.first and self.done == self.last - self.first + 1

    @contextmanager
    def step(self, number: int) -> Iterator[bool]:
        """Around one step; yields whether it is traced. A traced one must be waited for inside, or its marker closes too early."""
        if not self.covers(number):
            yield False
            return
        if number == self.first:
            self._start()
        with jax.profiler.StepTraceAnnotation(STEP_NAME, step_num=number):
            yield True
        self.done += 1
        if number == self.last:
            self.close()

    def close(self) -> None:
        """End the trace and write what there is of it. Does nothing outside the window."""
        if self._tracing:
            self._tracing = False
            try:
                jax.profiler.stop_trace()
            except (RuntimeError, OSError) as error:
                raise UserError(f"{self.folder}: the trace cannot be written: {first_line(error)}. Make room there") from error

    def _start(self) -> None:
        options = jax.profiler.ProfileOptions()
        options.host_tracer_level = 2  # with 0 a CPU's trace has no XLA events; 2 is jax's default and shows compilations
        options.python_tracer_level = 0  # every Python call: large files, and nothing that is asked here
        jax.profiler.start_trace(str(self.folder), profiler_options=options)
        self._tracing = True


def broken_down(steps: int, run: Callable[[int], object]) -> Breakdown:
    """The breakdown of this many steps, of a program that was compiled for a trace. run: makes a step and waits for it."""
    with tempfile.TemporaryDirectory() as folder:
        capture = Capture(Path(folder), 1, steps, after=-1)
        for number in range(steps):
            with capture.step(number + 1):
                run(number)
        return analyze(xplane.read(xplane.find(Path(folder))))


def compile_profiled(lowering: Any, options: dict[str, str | bool] | None = None) -> Any:
    """Compile a program (`jax.jit(f).lower(…)`) so that a trace tells its parts. options: of the compiler, besides."""
    with whole_programs():
        return lowering.compile(compiler_options=(options or {}) | (compiler_options(jax.default_backend()) or {}) or None)


def compiler_options(platform: str) -> dict[str, str | bool] | None:
    """What a profiled program is compiled with.

    On a GPU, without CUDA graphs (command buffers): they may hide from the trace which instruction a kernel belongs to. It is this
    program's option, not the process's. The GPU's compiler takes it (tried without a GPU); its effect on a trace is untested.
    """
    return {"xla_gpu_enable_command_buffer": ""} if platform == "gpu" else None


@contextmanager
def whole_programs() -> Iterator[None]:
    """Compile without jax's cache on disk, if one is set: of a program that comes from there, the trace does not hold the instructions,
    and nothing could be said of its events."""
    settings: Any = jax.config
    if not settings.jax_compilation_cache_dir or not settings.jax_enable_compilation_cache:
        yield
        return
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # jax decides only once whether it uses one
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()


def plugin_hint() -> str | None:
    """What to install for TensorBoard's Profile tab, if it is missing."""
    return None if installation.version("xprof") else f"for TensorBoard's Profile tab: {installation.for_extra('profile')}"
