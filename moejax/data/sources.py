"""Records from a source, checked against what the config declares."""

from __future__ import annotations

import hashlib

from moejax.config import DataConfig
from moejax.data import places
from moejax.data.records import Record, judged
from moejax.errors import UserError


def load_records(config: DataConfig, source: str | None = None) -> list[Record]:
    """The records of `source` (default: the config's), each with the keys instruction, input, output (or text).

    What a source names: `places`. Declared records, bytes and sha256 are checked for the config's own source. Raises UserError naming
    the file and the line or record.
    """
    declared = source is None or source == config.source
    name = source or config.source
    assert name is not None
    given = "data.source" if declared else "--data"

    def check(path: str, content: bytes) -> None:
        _check_identity(path, content, config)

    one_file = declared and (config.bytes is not None or config.sha256 is not None)
    parts, _ = places.read(name, config.config_name, config.split, given, check if one_file else None)
    count = sum(len(part.records) for part in parts)
    if not count:
        raise UserError(f"{name} holds no records")
    if declared and config.records is not None and count != config.records:
        raise UserError(f"{name} holds {count} records, data.records declares {config.records}: another version of the data?")
    return [judged(part.name, index, record, config) for part in parts for index, record in enumerate(part.records)]


def _check_identity(path: str, content: bytes, config: DataConfig) -> None:
    if config.bytes is not None and len(content) != config.bytes:
        raise UserError(f"{path} has {len(content)} bytes, data.bytes declares {config.bytes}: an incomplete or another file")
    if config.sha256 is not None:
        found = hashlib.sha256(content).hexdigest()
        if found != config.sha256:
            raise UserError(f"{path} has sha256 {found}, data.sha256 declares {config.sha256}: another version of the data")
