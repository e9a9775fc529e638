"""Records from a file or from `datasets`, checked against what the config declares."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from moejax.config import DataConfig
from moejax.errors import UserError, first_line

Record = dict[str, Any]


def load_records(config: DataConfig, source: str | None = None) -> list[Record]:
    """The records of `source` (default: the config's), each with the keys instruction, input, output (or text).

    A path or URL that ends in .json or .jsonl is a file (a URL is downloaded once, into the cache of `datasets`); anything else is a
    name for `datasets.load_dataset`. Declared records, bytes and
    sha256 are checked for the config's own source. Raises UserError naming the file and the line or record.
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
    return [_normalized(name, index, record, config) for index, record in enumerate(records)]


def is_file(name: str) -> bool:
    """Whether a source is a file, here or behind a URL; else it is a name for `datasets`."""
    return name.endswith((".json", ".jsonl"))


def read_file(name: str, given: str) -> bytes:
    """A file's bytes; a URL is downloaded once. given: what named it. Raises UserError where there is none."""
    path = _downloaded(name, given) if name.startswith(("https://", "http://")) else Path(name)
    if not path.is_file():
        raise UserError(f"data file {path} does not exist ({given}: a .json or .jsonl file, or a name for `datasets`)")
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


def parse(path: str, content: bytes) -> list[Any]:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    if not text.strip():
        raise UserError(f"{path} is empty")
    if path.endswith(".json"):
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {error.lineno}: broken JSON: {error.msg}") from None
        if not isinstance(records, list):
            raise UserError(f"{path}: expected a JSON list of records, got {type(records).__name__}")
        return records
    records = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a text may hold a line separator of Unicode's
        if line.strip():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: broken JSON: {error.msg}") from None
    return records


def from_datasets(name: str, configuration: str | None, split: str | None, given: str) -> list[Any]:
    """The records of a name for `datasets`. Raises UserError where it cannot be loaded."""
    if Path(name).is_file():
        raise UserError(f"{given} {name}: expected a file that ends in .json or .jsonl")
    import datasets

    try:
        return list(datasets.load_dataset(name, configuration, split=split))
    except Exception as error:
        raise UserError(
            f"{given} {name!r}: `datasets` could not load it ({type(error).__name__}: {first_line(error)}). "
            f"Expected a local .json/.jsonl file or a data set's name; without a network, point {given} to a file"
        ) from error


def _normalized(name: str, index: int, record: Any, config: DataConfig) -> Record:
    if not isinstance(record, dict):
        raise UserError(f"{name}, record {index}: expected an object, got {type(record).__name__}")
    f = config.fields
    if config.template == "text":
        return {"text": _text(name, index, record, f.text)}
    output = _text(name, index, record, f.output)
    return {
        "instruction": _text(name, index, record, f.instruction),
        "input": record.get(f.input) or "",
        "output": output,
        "answer": record.get("answer"),
    }


def _text(name: str, index: int, record: Record, field: str) -> str:
    value = record.get(field)
    if not isinstance(value, str):
        raise UserError(
            f"{name}, record {index}: no text under {field!r} (it has {', '.join(record)}); data.fields can name another column"
        )
    return value
