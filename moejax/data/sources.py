"""Records from a file or from `datasets`, checked against what the config declares."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from moejax.config import DataConfig
from moejax.data.parsing import EXPECTED, SUFFIXES, parse
from moejax.data.records import Record, judged
from moejax.errors import UserError, first_line


def load_records(config: DataConfig, source: str | None = None) -> list[Record]:
    """The records of `source` (default: the config's), each with the keys instruction, input, output (or text).

    A URL, a path that exists, and what ends as a file does (parsing.SUFFIXES) is a file (a URL is downloaded once, into the cache of
    `datasets`); anything else is a name for `datasets.load_dataset`. Declared records, bytes and sha256 are checked for the config's
    own source. Raises UserError naming the file and the line or record.
    """
    declared = source is None or source == config.source
    name = source or config.source
    assert name is not None
    given = "--data" if source is not None and source != config.source else "data.source"
    if is_file(name):
        content = read_file(name, given)
        if declared:
            _check_identity(name, content, config)
        records = parse(name, content)
    else:
        records = from_datasets(name, config.config_name, config.split, given)
    if not records:
        raise UserError(f"{name} holds no records")
    if declared and config.records is not None and len(records) != config.records:
        raise UserError(
            f"{name} holds {len(records)} records, data.records declares {config.records}: another version of the data?"
        )
    return [judged(name, index, record, config) for index, record in enumerate(records)]


def is_file(name: str) -> bool:
    """Whether a source is a file, here or behind a URL; else it is a name for `datasets`."""
    return is_url(name) or name.lower().removesuffix(".gz").endswith(SUFFIXES) or (Path(name).exists() and not Path(name).is_dir())


def is_url(name: str) -> bool:
    return name.startswith(("https://", "http://"))


def read_file(name: str, given: str) -> bytes:
    """A file's bytes; a URL is downloaded once. given: what named it. Raises UserError where there is none."""
    path = _downloaded(name, given) if is_url(name) else Path(name)
    if path.is_dir():
        raise UserError(f"{given} {path} is a folder: expected {EXPECTED}, or a name for `datasets`")
    if not path.exists():
        raise UserError(f"data file {path} does not exist ({given}: {EXPECTED}, or a name for `datasets`)")
    return path.read_bytes()


def _downloaded(url: str, given: str) -> Path:
    import datasets

    try:
        return Path(datasets.DownloadManager().download(url))
    except Exception as error:
        raise UserError(
            f"{given} {url}: the download failed ({type(error).__name__}: {first_line(error)}). "
            f"Check the network, or point {given} to a local copy"
        ) from error


def _check_identity(path: str, content: bytes, config: DataConfig) -> None:
    if config.bytes is not None and len(content) != config.bytes:
        raise UserError(f"{path} has {len(content)} bytes, data.bytes declares {config.bytes}: an incomplete or another file")
    if config.sha256 is not None:
        found = hashlib.sha256(content).hexdigest()
        if found != config.sha256:
            raise UserError(f"{path} has sha256 {found}, data.sha256 declares {config.sha256}: another version of the data")


def from_datasets(name: str, configuration: str | None, split: str | None, given: str) -> list[Any]:
    """The records of a name for `datasets`. Raises UserError where it cannot be loaded."""
    import datasets

    try:
        return list(datasets.load_dataset(name, configuration, split=split))
    except Exception as error:
        raise UserError(
            f"{given} {name!r}: `datasets` could not load it ({type(error).__name__}: {first_line(error)}). "
            f"Expected {EXPECTED}, or a data set's name; without a network, point {given} to a file"
        ) from error
