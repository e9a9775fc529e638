"""Commands that install what is missing, for a checkout and for a wheel: by the requirements themselves, into this Python."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import sys
import tomllib
from pathlib import Path

PACKAGE = Path(__file__).parent
CONFIGS = PACKAGE / "configs"
PROJECT = PACKAGE.parent / "pyproject.toml"


def checkout() -> Path | None:
    """The root of the checkout that runs; None where moejax was installed as a wheel."""
    return PROJECT.parent if PROJECT.is_file() and 'name = "moejax"' in PROJECT.read_text(encoding="utf-8") else None


def requirements(extra: str | None = None) -> list[str]:
    """What moejax needs, or what its `extra` adds, as pip takes it. Read from the checkout, else from the installed package."""
    if checkout():
        project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
        return list(project["dependencies"] if extra is None else project["optional-dependencies"].get(extra, ()))
    try:
        listed = importlib.metadata.requires("moejax") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    split = [(line.partition(";")[0].strip(), re.search(r"""extra\s*==\s*['"]([^'"]+)['"]""", line)) for line in listed]
    return [text for text, found in split if (found[1] if found else None) == extra]


def name_of(requirement: str) -> str:
    """`optax` of `optax>=0.2.6,<0.3`, as package indexes write it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0]).lower()


def pip_install(*wanted: str) -> str:
    """The command that installs these requirements into the Python that runs."""
    return shlex.join([sys.executable or "python", "-m", "pip", "install", *wanted])


def for_extra(extra: str) -> str:
    """The command that installs what an extra adds; jax's plugins in the version of the jax that is installed, and the libtpu that it asks
    for."""
    jax = version("jaxlib")
    if not jax:
        return pip_install(*requirements(extra))
    of_jax = {name_of(r): r.partition(";")[0].strip() for r in importlib.metadata.requires("jax") or [] if r.startswith("libtpu")}
    wanted = (of_jax.get(name_of(requirement), requirement) for requirement in requirements(extra))
    return pip_install(*(re.sub(r"^(jax[\w\[\]-]*).*", rf"\1=={jax}", requirement) for requirement in wanted))


def for_packages(names: list[str]) -> str:
    """The command that installs these of moejax's packages, in versions that it works with."""
    known = {name_of(requirement): requirement for requirement in requirements()}
    return pip_install(*(known.get(name_of(name), name) for name in names))


def version(package: str) -> str | None:
    """The installed version; None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Of what compiles."""
    names = ("jax", "jaxlib", "flax", "optax", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cuda-nvcc-cu12", "libtpu")
    return {name: found for name in names if (found := version(name)) is not None}
