"""The quick tests with the lowest and the newest versions that pyproject.toml allows, by each Python.

The lowest: of everything moejax names, by the oldest Python (what was built before a newer one has no wheels for it); of jax, flax and
transformers by the others.

    python benchmarks/versions.py [--python 3.11 …] [--ends lowest newest] [--folder .venv-versions] [-- PYTEST'S ARGUMENTS]

Makes an environment of its own for each. A Python that is not on the path is skipped, which is reported. Exit code 1 where a test fails.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PINNED = ("jax", "flax", "transformers")
PYTHONS = ("3.11", "3.12", "3.13")
ENDS = ("lowest", "newest")
QUICK = ["-q", "-n", "2", "--dist", "worksteal"]


def pins(end: str, version: str) -> list[str]:
    """Requirements that move packages to this end of what is allowed, for this Python; the newest is what pip chooses anyway."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    needed = {r.name: r for r in map(Requirement, content["project"]["dependencies"])}
    names = needed if version == PYTHONS[0] else PINNED
    lowest = {name: next(s.version for s in needed[name].specifier if s.operator == ">=") for name in names}
    return [f"{name}=={version}" for name, version in lowest.items()] if end == "lowest" else []


def interpreter(version: str) -> str | None:
    """Its path; None where it is not there, or a stand-in that does not run."""
    found = shutil.which(f"python{version}")
    runs = found is not None and subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode == 0
    return found if runs else None


def installed(python: Path) -> dict[str, str]:
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {PINNED}}}))"
    found: dict[str, str] = json.loads(subprocess.run([python, "-c", code], capture_output=True, check=True).stdout)
    return found


def tested(version: str, end: str, folder: Path, arguments: list[str]) -> tuple[str, bool]:
    """(what to say of it, whether it is in order)."""
    found = interpreter(version)
    if found is None:
        return f"skipped: there is no python{version}", True
    python = folder / f"{version}-{end}" / "bin" / "python"
    if not python.exists():
        subprocess.run([found, "-m", "venv", python.parent.parent], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    upgrade = ["--upgrade", "--upgrade-strategy", "eager"] if end == "newest" else []
    if subprocess.run([*pip, *upgrade, "-e", f"{ROOT}[test]", *pins(end, version)], check=False).returncode != 0:
        return "cannot be installed", False
    have = ", ".join(f"{name} {number}" for name, number in installed(python).items())
    done = subprocess.run([python, "-m", "pytest", *arguments], cwd=ROOT, check=False)
    return f"{have}: {'passed' if done.returncode == 0 else 'failed'}", done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--python", nargs="+", default=PYTHONS, metavar="VERSION", help="default: 3.11 3.12 3.13")
    parser.add_argument("--ends", nargs="+", default=ENDS, choices=ENDS)
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-versions", help="for the environments")
    parser.add_argument("pytest", nargs="*", help="pytest's arguments, after --: default, the quick tests")
    options = parser.parse_args()
    said = {}
    for version in options.python:
        for end in options.ends:
            said[version, end] = tested(version, end, options.folder.absolute(), options.pytest or QUICK)
            print(f"Python {version}, {end}: {said[version, end][0]}", flush=True)
    print("", *(f"Python {version}, {end}: {text}" for (version, end), (text, _) in said.items()), sep="\n")
    return 0 if all(good for _, good in said.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
