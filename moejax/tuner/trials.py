"""A candidate's child process: started with a time limit, and what became of it in words."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from moejax import installation
from moejax.errors import UserError
from moejax.tuner.registry import OPERATIONS, Candidate

_MODULE = "moejax.tuner.trial"


def environment() -> dict[str, str]:
    """Of a child: it imports this checkout, takes memory as it needs it, and stays quiet."""
    path = os.pathsep.join(str(p) for p in (installation.checkout(), os.environ.get("PYTHONPATH")) if p)
    return os.environ | {"PYTHONPATH": path, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}


def request(operation: str, device: str, shape: dict[str, Any], portable: Candidate, candidate: Candidate) -> dict[str, Any]:
    return {
        "module": OPERATIONS[operation], "device": device, "shape": shape, "portable": portable.entry, "entry": candidate.entry,
        "built_by": candidate.built_by,
    }  # fmt: skip


def run(asked: dict[str, Any], seconds: float) -> dict[str, Any]:
    """{status, …}: "measured" with both paths' seconds; else "wrong", "failed", "no room", "hung" or "died", with `why`."""
    with tempfile.TemporaryDirectory(prefix="moejax-tune-") as top:
        question, answer, log = (Path(top) / name for name in ("request.json", "result.json", "log"))
        question.write_text(json.dumps(asked), encoding="utf-8")
        began = time.monotonic()
        with log.open("wb") as written:
            process = subprocess.Popen(
                [sys.executable, "-m", _MODULE, str(question), str(answer)], stdin=subprocess.DEVNULL, stdout=written,
                stderr=subprocess.STDOUT, env=environment(), start_new_session=True,
            )  # fmt: skip
            try:
                code: int | None = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                if process.poll() is None:
                    _end(process)
        result = _read(answer)
        took = {"took": round(time.monotonic() - began, 1)}
        if result.get("status", "running") != "running":
            return result | took
        at = f" at: {result['stage']}" if "stage" in result else " before it began"
        if code is None:
            return {"status": "hung", "why": f"not done after {seconds:.0f} s,{at}"} | took
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if code == -signal.SIGKILL:
            how += " (as the system does when the host's memory is full)"
        return {"status": "died", "why": f"{how}{at}{f': {lines[-1][:160]}' if lines and code > 0 else ''}"} | took


def device(seconds: float = 120.0) -> str:
    """`choice.here`, as a child sees it. Raises UserError where it does not answer."""
    with tempfile.TemporaryDirectory(prefix="moejax-tune-") as top:
        answer = Path(top) / "device.json"
        with contextlib.suppress(subprocess.TimeoutExpired):
            command = [sys.executable, "-m", _MODULE, "--device", str(answer)]
            subprocess.run(command, env=environment(), capture_output=True, timeout=seconds, check=False)
        found = _read(answer).get("device")
    if found is None:
        raise UserError("jax does not start here: `moejax doctor` says what is wrong (device.tune=off: nothing is measured before a run)")
    return str(found)


def _end(process: subprocess.Popen[bytes]) -> None:
    """With what it started: a compiler."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(answer: Path) -> dict[str, Any]:
    try:
        found = json.loads(answer.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
