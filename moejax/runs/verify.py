"""Whether everything that a run's folder holds is what was written: nothing is trained, nothing is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from moejax import config, json_lines
from moejax.errors import UserError
from moejax.hub.safetensors_file import Summed
from moejax.profiling import schema


class Verified(NamedTuple):
    """A part of a run: its name in the folder, and what is wrong with it, "" for nothing."""

    part: str
    wrong: str


def files(folder: Path) -> Iterator[Verified]:
    """Config, metrics, profile and trained weights of a run's folder. Raises UserError where there is no run."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} holds no config.yaml: expected a run's folder, e.g. runs/demo")
    yield _judged("config.yaml", lambda: config.load(folder / "config.yaml"))
    if (folder / "metrics.jsonl").is_file():
        _, damaged = json_lines.read(folder / "metrics.jsonl")
        yield Verified("metrics.jsonl", f"line {damaged[0]} is not whole; --resume drops such lines" if damaged else "")
    if (folder / schema.FILE_NAME).is_file():
        yield _judged(schema.FILE_NAME, lambda: schema.read(folder))
    for path in sorted(folder.rglob("*.safetensors")):
        if "damaged" not in path.relative_to(folder).parts:
            yield _judged(str(path.relative_to(folder)), lambda path=path: _tensors(path))  # type: ignore[misc]


def _tensors(path: Path) -> None:
    with closing(Summed(path)) as file:
        for name in file.names():
            file.read(name)


def _judged(part: str, read: Callable[[], object]) -> Verified:
    try:
        read()
    except UserError as error:
        return Verified(part, str(error))
    return Verified(part, "")
