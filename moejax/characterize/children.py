"""Trials as child processes: started, waited for, and what is left of one that died. And the search for the largest batch that runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moejax.characterize.trial import result_path
from moejax.errors import UserError
from moejax.estimating import ROOT
from moejax.files import replace_text

MODULE = "moejax.characterize.trial"


@dataclass
class Result:
    """What a trial left. status: "done", "out_of_memory" or "failed"."""

    status: str
    message: str | None
    seconds: float | None
    command: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def final(self) -> bool:
        """Whether it need not run again: a failed one does."""
        return self.status in ("done", "out_of_memory")


def read(path: Path) -> Result | None:
    """A kept result; None where there is none. Raises UserError for a file that is none."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Result(**{"command": "", **content})
    except (ValueError, TypeError, UnicodeDecodeError):
        raise UserError(f"{path} is no result of a trial: delete it, and the trial runs again") from None


def keep(path: Path, result: Result) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(vars(result), indent=1, allow_nan=False) + "\n")


@dataclass(frozen=True)
class Runner:
    """Runs trials of a folder. start: the command line of a trial, before DIR; lock: a file descriptor that the children hold too."""

    folder: Path
    lock: int | None = None
    start: tuple[str, ...] = (sys.executable, "-m", MODULE)

    def command(self, trial: str, rows: int | None = None) -> list[str]:
        return [str(self.folder), trial, *([] if rows is None else ["--rows", str(rows)])]

    def told(self, trial: str, rows: int | None = None) -> str:
        """The command as the results show it."""
        return " ".join(["python", "-m", MODULE, *self.command(trial, rows)])

    def run(self, trial: str, rows: int | None = None, *, attempt: bool = False) -> Result:
        """A trial's result: kept, or of a child process that runs it now. attempt: one of several with other rows."""
        path = result_path(self.folder, trial, rows if attempt else None)
        before = read(path)
        if before is not None and before.final:
            return before
        path.unlink(missing_ok=True)
        log = self.folder / "logs" / f"{path.relative_to(self.folder / 'trials').with_suffix('')}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        begin = time.perf_counter()
        code = self._wait([*self.start, *self.command(trial, rows)], log)
        seconds = time.perf_counter() - begin
        result = read(path)
        if result is None:
            result = Result("failed", _reason(code, log), seconds, "")
        # The whole process counts: starting and compiling too.
        result = Result(**(vars(result) | {"seconds": seconds, "command": self.told(trial, rows)}))
        keep(path, result)
        return result

    def _wait(self, command: list[str], log: Path) -> int:
        path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": path},
                pass_fds=() if self.lock is None else (self.lock,),
            )  # fmt: skip
            try:
                return process.wait()
            except BaseException:
                process.kill()
                process.wait()
                raise


def _reason(code: int, log: Path) -> str:
    """Why a child ended without a result: its signal, or the last line that it wrote."""
    if code < 0:
        told = f"killed by {signal.Signals(-code).name}"
        return f"{told}: out of the machine's memory?" if code == -signal.SIGKILL else told
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = lines[-1].removeprefix("error: ")[:300] if lines else "it wrote nothing"
    return f"exit code {code}: {last}"


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
