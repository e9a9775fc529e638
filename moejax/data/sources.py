"""Records of the config's sources, checked against what it declares."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

from moejax.config_data import DataConfig
from moejax.config_sources import FieldNames, WeightedSource
from moejax.data import places
from moejax.data.columns import Columns, find, find_pairs
from moejax.data.records import Record, judged
from moejax.data.shelf import held
from moejax.errors import UserError


class Part(NamedTuple):
    """Records of one file. first: the number there of the first of them."""

    name: str
    records: Sequence[Record]
    first: int = 0


@dataclass(frozen=True)
class Source:
    """The records of one source, by files. weight: how often an epoch has them; columns: which were read; notes: what was not read."""

    name: str
    weight: float
    parts: tuple[Part, ...]
    columns: Columns
    notes: tuple[str, ...] = ()

    @property
    def records(self) -> Iterator[Record]:
        return chain.from_iterable(part.records for part in self.parts)

    @property
    def count(self) -> int:
        return sum(len(part.records) for part in self.parts)

    def parted(self, held_out: int) -> tuple[Source, Source]:
        """All but the last N records, and those."""
        border = self.count - held_out
        before, after = [], []
        for part in self.parts:
            here = min(max(border, 0), len(part.records))
            before.append(Part(part.name, part.records[:here], part.first))
            after.append(Part(part.name, part.records[here:], part.first + here))
            border -= here
        kept = (tuple(part for part in parts if part.records) for parts in (before, after))
        return tuple(replace(self, parts=parts) for parts in kept)  # type: ignore[return-value]


def load_records(config: DataConfig, source: str | None = None, *, pairs: bool = False) -> list[Record]:
    """The records of `load_sources` in one list."""
    return list(chain.from_iterable(one.records for one in load_sources(config, source, pairs=pairs)))


def load_sources(config: DataConfig, source: str | None = None, *, pairs: bool = False) -> list[Source]:
    """The sources of the config, or `source` alone; each record as `records.judged` has it. pairs: both sides of preferences are read.

    What a source names: `places`. Declared records, bytes and sha256 are checked for the config's own. Raises UserError naming the file
    and the line or record.
    """
    declared = source is None or source == config.source
    asked = config.sources if source is None or declared else (config.model_copy(update={"source": source}).sources)
    given = "data.source" if declared else "data.eval_source" if source == config.eval_source else "--data"
    loaded = [_load(one, config, declared=declared, given=given, pairs=pairs) for one in asked]
    count = sum(one.count for one in loaded)
    if declared and config.records is not None and count != config.records:
        raise UserError(f"{config.named} holds {count} records, data.records declares {config.records}: another version of the data?")
    return loaded


def _load(one: WeightedSource, config: DataConfig, *, declared: bool, given: str, pairs: bool) -> Source:
    def check(path: str, content: Any) -> None:
        _check_identity(path, content, config)

    one_file = declared and (config.bytes is not None or config.sha256 is not None)
    parts, notes = places.read(
        one.source, one.config_name, one.split, given, check if one_file else None, streaming=config.streaming
    )
    columns, made, others = _judged(parts, one.source, one.fields or config.fields, config.template, pairs, streaming=config.streaming)
    return Source(one.source, one.weight, made, columns, (*notes, *others))


def of_records(records: Sequence[object], config: DataConfig, name: str = "records") -> list[Record]:
    """Records that a caller has, as those of a source are read. name: for messages. Raises UserError as `load_sources` does."""
    return list(_judged([places.Part(name, list(records))], name, config.fields, config.template)[1][0].records)


def _judged(
    parts: Sequence[places.Part], name: str, fields: FieldNames, template: str | None, pairs: bool = False, *, streaming: bool = False
) -> tuple[Columns, tuple[Part, ...], list[str]]:
    """The columns of a source, and its records, each judged. A record with other columns that are known too is read by them; how many such
    there are, and where the first is, are the notes. Raises UserError, also for one of another kind than its file's first."""
    first = next((part for part in parts if part.records), None)
    if first is None:
        raise UserError(f"{name} holds no records")
    keys = dict.fromkeys(key for part in parts for record in part.records if isinstance(record, dict) for key in record)

    def columns_of(where: str, record: object, keys: Iterable[object]) -> Columns:
        return find_pairs(where, record, keys, fields) if pairs else find(where, record, keys, fields, template)

    columns = columns_of(f"{first.name}, record 0", first.records[0], keys)
    mixed: dict[Columns, list[str]] = {}

    def own(where: str, record: object) -> Columns:
        """The columns of a record."""
        if not isinstance(record, dict) or (all if pairs else any)(record.get(name) is not None for name in columns.needed):
            return columns
        there = {key: value for key, value in record.items() if value is not None}  # a table fills other schemas' columns with null
        try:
            other = columns_of(where, there, there)._replace(others=())
        except UserError:
            return columns  # `judged` says what is missing
        if other.needed != columns.needed:
            mixed.setdefault(other, []).append(where)
        return other

    def of_part(part: places.Part) -> Iterator[Record]:
        begun = columns
        for n, record in enumerate(part.records):
            found = own(f"{part.name}, record {n}", record)
            begun = begun if n else found
            if found.kind != begun.kind:
                raise UserError(
                    f"{part.name}, record {n}: {found.kind} ({found.read}), where record 0 is {begun.kind} ({begun.read}): put the two "
                    "into files of their own, and give both: data.source='[ONE, OTHER]'"
                )
            yield judged(part.name, n, record, found)

    judged_parts = held(map(of_part, parts), streaming=streaming)
    made = tuple(Part(part.name, records) for part, records in zip(parts, judged_parts, strict=True))
    return columns, made, [
        f"mixed schemas: {len(where):,} of {sum(len(part.records) for part in parts):,} records with other columns, {other.told()}, first "
        f"{where[0]}"
        for other, where in mixed.items()
    ]


def parted(sources: Sequence[Source], held_out: int) -> tuple[list[Source], list[Source]]:
    """The sources without the last `held_out` records, and with those alone: of several, from each in proportion to its number of records.

    Raises UserError where nothing is left to train on.
    """
    counts = [source.count for source in sources]
    total = sum(counts)
    if held_out >= total:
        raise UserError(f"data.holdout = {held_out} leaves nothing of {total} records to train on")
    ends, done = [], 0
    for count in counts:  # the borders are rounded, so that they add up
        done += count
        ends.append(held_out * done // total)
    pairs = [source.parted(end - begin) for source, begin, end in zip(sources, [0, *ends], ends, strict=False)]
    return [before for before, _ in pairs], [after for _, after in pairs if after.parts]


def _check_identity(path: str, content: Any, config: DataConfig) -> None:
    if config.bytes is not None and len(content) != config.bytes:
        raise UserError(f"{path} has {len(content)} bytes, data.bytes declares {config.bytes}: an incomplete or another file")
    if config.sha256 is not None:
        found = hashlib.sha256(content).hexdigest()
        if found != config.sha256:
            raise UserError(f"{path} has sha256 {found}, data.sha256 declares {config.sha256}: another version of the data")
