"""What was chosen on this machine: a file a card in the user's cache, good for one driver and one set of versions, with a checksum."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moejax import compiler_options, installation, libtpu
from moejax.device import cpu_name
from moejax.files import cache_folder, replace_text
from moejax.tuner import trials

SCHEMA = 1
IN_RUN = "tuned.json"
"""In a run's folder: what it began with."""
_LIBRARIES = ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "tokamax")


class Unusable(Exception):
    """A file that is damaged or of another machine, in words."""


def about(device: str) -> dict[str, Any]:
    """What a choice is good for. device: as `choice.here` names it."""
    further = {name: found for name in _LIBRARIES if (found := installation.version(name)) is not None}
    return {
        "device": device, "card": cpu_name() if device == "cpu" else device, "driver": compiler_options.driver(),
        "versions": installation.versions() | further | {"moejax": installation.version("moejax")},
    }  # fmt: skip


def device_asked() -> str:
    """`choice.here`, without taking a GPU's memory, or a TPU, where there may be one."""
    if compiler_options.nvidia_asked() or libtpu.here() is not None:
        return trials.device()
    from moejax.models.ops import choice

    return choice.here()


def place(device: str) -> Path:
    return cache_folder() / "choices" / f"{re.sub(r'[^A-Za-z0-9]+', '-', device).strip('-')}.json"


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read(path: Path, made_on: dict[str, Any]) -> list[dict[str, Any]]:
    """The sites in it; none where there is no file. Raises Unusable."""
    if not path.exists():
        return []
    again = "it is ignored; `moejax tune CONFIG` measures again"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        told = content.pop("sha256")
        if content["schema"] != SCHEMA or told != _checksum(content):
            raise ValueError
        before, sites = content["made_on"], list(content["sites"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise Unusable(f"{path} is damaged, or of another moejax (its checksum does not fit): {again}") from None
    if before != made_on:
        raise Unusable(f"{path} was measured with {differences(before, made_on)}: {again}")
    return sites


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    flat = [{**record, **record["versions"]} for record in (before, now)]
    names = [name for name in {**flat[0], **flat[1]} if name != "versions" and flat[0].get(name) != flat[1].get(name)]
    return ", ".join(f"{name} {flat[0].get(name) or 'absent'} (now {flat[1].get(name) or 'absent'})" for name in names)


def write(path: Path, made_on: dict[str, Any], sites: Iterable[dict[str, Any]]) -> None:
    """Replaces the file. Raises OSError."""
    content = {"schema": SCHEMA, "made_on": made_on, "sites": list(sites)}
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps({"sha256": _checksum(content), **content}, indent=1) + "\n")


def merged(before: Iterable[dict[str, Any]], now: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of now, and of before what is of another operation or shape."""
    new = list(now)
    return [*new, *(b for b in before if all((b["operation"], b["shape"]) != (n["operation"], n["shape"]) for n in new))]
