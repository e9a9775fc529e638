"""`python -m moejax.study.characterize.trial DIR TRIAL [--rows N]`: one trial of a study, in a process of its own.

It reads the study from DIR/characterize.json and writes DIR/trials/TRIAL.json (an attempt at a batch: TRIAL@N.json) when it is over; a
process that dies leaves nothing there, and the parent says so. When the study that started it dies, it is killed. What is slow to import
is imported after that is arranged.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejax import streams
from moejax.errors import UserError

if TYPE_CHECKING:
    from moejax.study.characterize import plan, study
    from moejax.study.characterize.result import Result
    from moejax.study.report import results

_PR_SET_PDEATHSIG = 1


def arguments(folder: Path, trial: str, rows: int | None = None) -> list[str]:
    """A trial's command line behind the module's name."""
    return [str(folder), trial, *([] if rows is None else ["--rows", str(rows)])]


def told(folder: Path, trial: str, rows: int | None = None) -> str:
    """The command as the results show it: what a shell takes."""
    return shlex.join(["python", "-m", "moejax.study.characterize.trial", *arguments(folder, trial, rows)])


def main() -> int:
    streams.prepare()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("trial", metavar="TRIAL")
    parser.add_argument("--rows", type=int, help="of a step")
    parser.add_argument("--parent", type=int, metavar="PID", help="the study's process: this one ends with it")
    options = parser.parse_args()
    if options.parent is not None:
        end_with(options.parent)
    try:
        return run(options.folder, options.trial, options.rows)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(folder: Path, trial: str, rows: int | None) -> int:
    """Measure and write. Returns 0 for a trial that came to an end, out of memory included."""
    from moejax.study.characterize import fits, plan, result, study
    from moejax.study.report import results

    found = results.read_plan(folder)
    parts = study.from_config(found.config)
    task = next((t for t in plan.tasks(parts) if t.name == trial), None)
    if task is None:
        raise UserError(f"{folder} has no trial {trial!r}: its plan is in {folder / results.STUDY_FILE}")
    start = time.perf_counter()
    made = fits.run(task, parts, found, folder) if task.kind in ("fit", "cost") else _measured(task, parts, found, rows)
    made.seconds, made.command = time.perf_counter() - start, told(folder, trial, rows)
    result.keep(result.path_of(folder, trial, rows if task.kind == "prove" else None), made)
    print(f"{trial}: {made.status}{'' if made.message is None else f': {made.message}'}")
    return 0


def _measured(task: plan.Task, parts: study.Study, found: results.Study, rows: int | None) -> Result:
    """Out of memory is a result."""
    from moejax.runtime import prepare_jax

    prepare_jax(task.setting.experiment.device)
    import jax

    from moejax.study.characterize import experiments
    from moejax.study.characterize.measure import OutOfMemory
    from moejax.study.characterize.result import HOST_MEMORY, Result

    t = experiments.Trial(task, parts, found.environment, parts.memory_limit)
    measure: Any = {
        "prove": experiments.attempt, "throughput": experiments.throughput, "breakdown": experiments.breakdown,
        "length": experiments.breakdown, "expert_load": experiments.expert_load,
    }.get(task.kind)  # fmt: skip
    try:
        if task.kind == "predict":
            return experiments.predict(t)
        if rows is None or rows < 1:
            raise UserError(f"{task.name}: --rows is missing: how many rows a step has")
        return measure(t, rows)
    except OutOfMemory as error:
        return Result("out_of_memory", str(error))
    except MemoryError as error:
        return Result("failed", f"{HOST_MEMORY}: MemoryError{f': {error}' if str(error) else ''}")
    except (jax.errors.JaxRuntimeError, UserError) as error:  # the latter of a compile that failed
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Result("out_of_memory", str(error).splitlines()[0][:300])


def end_with(parent: int) -> None:
    """A study that was killed must leave no process on the device: from here on the kernel kills this one with it, whatever it does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
