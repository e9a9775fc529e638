"""What a source names: a file, a folder or a glob of files, a folder that `datasets` wrote, a URL, or a name for `datasets`."""

from __future__ import annotations

import glob
import mmap
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from moejax.data import compression
from moejax.data.parsing import EXPECTED, SUFFIXES, parse
from moejax.data.shelf import Shelf, held
from moejax.data.windows import windows
from moejax.errors import UserError, first_line
from moejax.files import meant

PLACES = f"{EXPECTED}, a folder or a glob of them, or a name for `datasets`"
_OF_DATASETS = ("state.json", "dataset_dict.json")  # in a folder that save_to_disk wrote
_ABOUT = (*_OF_DATASETS, "dataset_info.json", "dataset_infos.json")  # of a data set, and no data
_SPLITS = {"train": "train|training", "validation": "validation|valid|val|dev", "test": "test|testing|eval|evaluation"}
_SHOWN = 3  # names of files in a message


class Part(NamedTuple):
    """A file with its records as they were read, or all that `datasets` gave."""

    name: str
    records: Sequence[Any]


class Found(NamedTuple):
    """parts: in order; notes: what of the source was not read."""

    parts: list[Part]
    notes: list[str]


def is_url(name: str) -> bool:
    return name.startswith(("https://", "http://"))


def is_file(name: str) -> bool:
    """Whether a source is files, here or behind a URL: by what is there, or by its name. Else it is a name for `datasets`."""
    return is_url(name) or compression.bare(name.lower()).endswith(SUFFIXES) or Path(name).exists() or _is_glob(name)


def is_here(name: str) -> bool:
    """Whether a file, a folder, or files of a glob are on this machine."""
    return Path(name).exists() or (_is_glob(name) and bool(_matches(name)))


def _is_glob(name: str) -> bool:
    return glob.has_magic(name) and not is_url(name) and not Path(name).exists()


def _matches(name: str) -> list[str]:
    return sorted(glob.glob(name, recursive=True))  # noqa: PTH207 (pathlib's takes no absolute pattern)


def read(
    name: str, configuration: str | None, split: str | None, given: str, check: Callable[[str, Any], None] | None = None, *,
    streaming: bool = False,
) -> Found:  # fmt: skip
    """The records of a source, in an order that depends on names alone. given: what named it, for messages; check: called with the
    name and content of the one file that it must be.

    split: of a name for `datasets`, and of a folder's files where their names have such words (as `datasets` has them). A URL is
    downloaded once, into the cache of `datasets`. streaming: the records lie on disk, and no file is read whole. Raises UserError that
    names the source, or the file and the line.
    """
    folder = Path(name)
    if not is_file(name) or (folder.is_dir() and _for_datasets(folder, configuration, split)):
        return Found([Part(name, from_datasets(name, configuration, split, given, streaming=streaming))], [])
    if folder.is_dir() and any((folder / file).is_file() for file in _OF_DATASETS):
        return Found([Part(name, _from_disk(folder, split, list_of(streaming)))], [])
    notes: list[str] = []
    if is_url(name):
        files = [name]
    elif folder.is_dir():
        chosen, notes = _in_folder(folder, split or "train", given)
        files = [str(file) for file in chosen]
    elif _is_glob(name):
        files = [file for file in _matches(name) if Path(file).is_file()]
        if not files:
            raise UserError(f"{given} {name}: no file has such a name (looked for from {Path.cwd()})")
    else:
        files = [name]
    if (split or "train") != "train" and not folder.is_dir():
        notes.append(f"{name}: no folder, so its split {split!r} chooses nothing: all is read")
    if check is not None and len(files) > 1:
        raise UserError(f"{name} holds {len(files)} files: data.bytes and data.sha256 are of one file; remove them")

    def records_of(file: str) -> Iterable[Any]:
        path = _here(file, given)
        if not streaming:
            content = path.read_bytes()
            if check is not None:
                check(file, content)
            return parse(file, content)
        if check is not None:
            with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                check(file, mapped)
        return chain.from_iterable(windows(str(path)))

    parts = [Part(*each) for each in zip(files, held(map(records_of, files), streaming=streaming), strict=True)]
    silent = [part.name for part in parts if not part.records]
    if silent and len(silent) < len(parts):
        notes.append(f"{name}: {len(silent):,} of {len(parts):,} files without a record, first {silent[0]}")
    return Found(parts, notes)


def list_of(streaming: bool) -> type[list[Any]] | type[Shelf[Any]]:
    """What holds records and queries: a list, or one on disk."""
    return Shelf if streaming else list


def _here(name: str, given: str) -> Path:
    path = _downloaded(name, given) if is_url(name) else Path(name)
    if not path.exists():
        raise UserError(f"data file {path} does not exist{meant(path)} ({given}: {PLACES})")
    return path


def _downloaded(url: str, given: str) -> Path:
    import datasets

    try:
        return Path(datasets.DownloadManager().download(url))
    except Exception as error:
        raise UserError(
            f"{given} {url}: the download failed ({type(error).__name__}: {first_line(error)}). "
            f"Check the network, or point {given} to a local copy"
        ) from error


def _for_datasets(folder: Path, configuration: str | None, split: str | None) -> bool:
    """Whether only `datasets` knows what is asked of a folder: a configuration, a slice of a split, or what its README says of files."""
    if configuration is not None or (split or "train") not in _SPLITS:
        return not any((folder / file).is_file() for file in _OF_DATASETS)
    readme = folder / "README.md"
    head = readme.read_bytes()[:20_000].decode(errors="replace") if readme.is_file() else ""
    return head.startswith("---") and re.search(r"^configs:", head.split("\n---")[0], re.MULTILINE) is not None


def _in_folder(folder: Path, split: str, given: str) -> tuple[list[Path], list[str]]:
    """The data files of a folder and the folders in it that are of a split, by name; and what is not read."""
    inside = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    inside = [path for path in inside if not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)]
    data = [path for path in inside if compression.bare(path.name.lower()).endswith(SUFFIXES) and path.name not in _ABOUT]
    if not data:
        what = f" (it has {_listed(inside, folder)})" if inside else " (it is empty)"
        raise UserError(f"{given} {folder} is a folder without a data file{what}: expected {EXPECTED}")
    of = {path: _split_of(str(path.relative_to(folder))) for path in data}
    chosen = [path for path in data if of[path] == split]
    if not chosen and (split == "train" or not any(of.values())):
        chosen = [path for path in data if of[path] is None]
    if not chosen:
        raise UserError(f"{given} {folder} holds no file of the split {split!r}, by name: it has {_listed(data, folder)}")
    notes = []
    if split != "train" and not any(of.values()):
        notes.append(f"{folder}: no file's name has a split, so {split!r} chooses nothing: all are read")
    for others, what in ((data, "of another split, by name"), (inside, "of another kind")):
        left = [path for path in others if path not in chosen and (path in data) == (others is data)]
        if left:
            notes.append(f"{folder}: not read, {what}: {_listed(left, folder)}")
    return chosen, notes


def _split_of(name: str) -> str | None:
    words = "|".join(f"(?P<{split}>{spelled})" for split, spelled in _SPLITS.items())
    found = re.search(rf"(?:^|[^a-z])(?:{words})(?:[^a-z]|$)", name.lower())
    return None if found is None else found.lastgroup


def _listed(files: Sequence[Path], folder: Path) -> str:
    more = f" and {len(files) - _SHOWN:,} more" if len(files) > _SHOWN else ""
    return ", ".join(str(file.relative_to(folder)) for file in files[:_SHOWN]) + more


def from_datasets(name: str, configuration: str | None, split: str | None, given: str, *, streaming: bool = False) -> Sequence[Any]:
    """The records of a name for `datasets`. Raises UserError where it cannot be loaded."""
    import datasets

    try:
        return list_of(streaming)(datasets.load_dataset(name, configuration, split=split))
    except Exception as error:
        raise UserError(
            f"{given} {name!r}: `datasets` could not load it ({type(error).__name__}: {first_line(error)}). "
            f"Expected {PLACES}; without a network, point {given} to a file"
        ) from error


def _from_disk(folder: Path, split: str | None, made: Callable[[Iterable[Any]], Sequence[Any]]) -> Sequence[Any]:
    """What `save_to_disk` of `datasets` wrote: one data set, or one a split."""
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
        if isinstance(found, datasets.Dataset):
            return made(found)
        if (split or "train") in found:
            return made(found[split or "train"])
    except Exception as error:
        raise UserError(f"{folder}: a folder that `datasets` wrote, and damaged ({type(error).__name__}: {first_line(error)})") from error
    raise UserError(f"{folder} has the splits {', '.join(found)}, and no {split or 'train'!r}: choose one with data.split")
