"""Trials as child processes: started, waited for, and what is left of one that died. And the search for the largest batch that runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from moejax import installation
from moejax.study.characterize import trial as trials
from moejax.study.characterize.result import HOST_MEMORY, Result, keep, path_of, read

MODULE = "moejax.study.characterize.trial"


def environment() -> dict[str, str]:
    """Of a child: it imports this checkout, where there is one."""
    path = os.pathsep.join(str(p) for p in (installation.checkout(), os.environ.get("PYTHONPATH")) if p)
    return os.environ | {"PYTHONPATH": path}


@dataclass(frozen=True)
class Runner:
    """Runs trials of a folder. start: the command line of a trial, before DIR; lock: a file descriptor that the children hold too."""

    folder: Path
    lock: int | None = None
    start: tuple[str, ...] = (sys.executable, "-m", MODULE)

    def run(self, trial: str, rows: int | None = None, *, attempt: bool = False) -> Result:
        """A trial's result: kept, or of a child process that runs it now. attempt: one of several with other rows."""
        path = path_of(self.folder, trial, rows if attempt else None)
        before = read(path)
        if before is not None and before.final:
            return before
        path.unlink(missing_ok=True)
        log = self.folder / "logs" / f"{path.relative_to(self.folder / 'trials').with_suffix('')}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        begin = time.perf_counter()
        command = [*self.start, *trials.arguments(self.folder, trial, rows), "--parent", str(os.getpid())]
        code = self._wait(command, log)
        # The whole process counts: starting and compiling too.
        took, told = time.perf_counter() - begin, trials.told(self.folder, trial, rows)
        result = replace(read(path) or _ended(code, log), seconds=took, command=told)
        keep(path, result)
        return result

    def _wait(self, command: list[str], log: Path) -> int:
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment(),
                pass_fds=() if self.lock is None else (self.lock,),
            )  # fmt: skip
            try:
                return process.wait()
            except BaseException:
                process.kill()
                process.wait()
                raise


def _ended(code: int, log: Path) -> Result:
    """Of a child that ended without a result: its signal, or the last line that it wrote."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = lines[-1].removeprefix("error: ")[:300] if lines else "it wrote nothing"
    if code == -signal.SIGKILL:
        return Result("failed", f"{HOST_MEMORY}: killed by SIGKILL, as the kernel does then (or was it ended by hand?)")
    if "std::bad_alloc" in last:
        return Result("failed", f"{HOST_MEMORY}: {last}")
    return Result("failed", f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}: {last}")


def search(first: int, runs: Callable[[int], bool]) -> tuple[int, int]:
    """(largest that runs, smallest that does not), two neighbours, each tried. `first`: where to begin; 0 runs by definition."""
    low, high, rows, step = 0, None, max(1, first), 1
    while high is None or high - low > 1:
        if runs(rows):
            low = rows
        else:
            high = rows
        if high is not None and low:
            rows = (low + high) // 2
        else:  # the prediction is a little off, if it is: steps that grow, up or down, until one runs and one does not
            rows, step = low + step if high is None else max(1, high - step), 2 * step
    return low, high
