"""Two frameworks in turn, a step each: both meet the same noise. Each runs in a process of its own that answers "step"."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch_run

HERE = Path(__file__).parent


class Stopped(Exception):
    """A side ended: why, in its own words. out_of_memory: it had none left, or was killed for it."""

    def __init__(self, text: str, out_of_memory: bool):
        super().__init__(text)
        self.out_of_memory = out_of_memory


class Side:
    """A process that runs training steps on demand. environment: variables to set, or (None) to leave out."""

    def __init__(self, command: list[str], environment: dict[str, str | None] | None = None):
        variables = os.environ | (environment or {})
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed at the side's end)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={name: value for name, value in variables.items() if value is not None},
        )
        self.about = self._answer()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def step(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # why it ended is reported where its answer is awaited
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines() or ["no word"]
        raise Stopped(said[-1].removeprefix("error: "), out_of_memory=code in (torch_run.OUT_OF_MEMORY, -9))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._errors.close()


def jax_side(config: Path, overrides: list[str], arguments: list[str], environment: dict[str, str | None]) -> Side:
    return Side([sys.executable, str(HERE / "step.py"), "--config", str(config), "--serve", *arguments, *overrides], environment)


def torch_side(handover: Path, stack: str, python: Path, arguments: list[str]) -> Side:
    command = torch_run.command(handover, stack, python, ["--serve", *arguments])
    return Side(command, {"PYTHONPATH": None})  # the other environment has packages of its own


def alternate(sides: dict[str, Side], steps: int, warm_up: int = 2) -> dict[str, list[dict[str, Any]]]:
    """`steps` steps of every side, in turn, after `warm_up` rounds that do not count."""
    rounds = [{name: side.step() for name, side in sides.items()} for _ in range(warm_up + steps)][warm_up:]
    return {name: [r[name] for r in rounds] for name in sides}


def summary(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Median, spread, rates and memory of one side's steps."""
    seconds = [s["step_seconds"] for s in steps]
    median = statistics.median(seconds)
    memory = {name: value for name, value in steps[-1].items() if name.endswith("peak_bytes")}
    return {
        "step_seconds": seconds,
        "median": median,
        "fastest": min(seconds),
        "slowest": max(seconds),
        "queries_per_second": steps[-1]["queries"] / median,
        "tokens_per_second": steps[-1]["real_tokens"] / median,
    } | memory
