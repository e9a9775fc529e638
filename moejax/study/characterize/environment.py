"""`python -m moejax.study.characterize.environment DTYPE`: what this process's device is, as one line of JSON. A process of its own, so
that the study's parent never holds the device.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import asdict

from moejax import __version__, installation
from moejax.installation import versions
from moejax.study.report.results import Environment, digest


def git_commit() -> str | None:
    """The checkout's commit, with "+" where files were changed; None outside of one."""
    root = installation.checkout()
    if root is None:
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def describe(dtype: str) -> tuple[Environment, int | None]:
    """The environment, and the bytes that a process may use of the device (None on a CPU, which has no limit of its own)."""
    import jax

    from moejax import device as machine

    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    peak, source = machine.peak_flops(dtype)
    bandwidth, _ = machine.peak_bytes_per_second()
    content = {
        "device": machine.name(), "platform": "cpu" if device.platform == "cpu" else "gpu", "memory_bytes": machine.size_bytes(),
        "versions": {"python": platform.python_version(), "moejax": __version__} | versions(), "cpu": machine.cpu_name(),
        "git_commit": git_commit(),
    }  # fmt: skip
    peaks = {"peak_flops": peak, "peak_bytes_per_second": bandwidth, "peaks": "measured" if source == "measured" else "tabled"}
    return Environment(**content, **peaks, fingerprint=digest(content)), limit  # type: ignore[arg-type]


if __name__ == "__main__":
    found, usable = describe(sys.argv[1])
    print(json.dumps({"environment": asdict(found), "usable_bytes": usable}))
