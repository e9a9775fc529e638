"""A file's bytes to records. What a file is, its content says; what it is instead of records, the message."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from moejax.data import compression
from moejax.errors import UserError, first_line

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
EXPECTED = "a .json (a list), .jsonl (an object a line), .csv, .tsv, .parquet or .arrow file"
_BOMS = (
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
_OTHERS = (
    (b"PK\x03\x04\x14\x00\x06\x00", "an Excel workbook or another Office document: save the table as CSV"),
    (b"PK\x03\x04", "a zip archive: unpack it and give the file in it"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it and give the file in it"),
    (b"SQLite format 3", "an SQLite database: write its table as CSV or JSON Lines"),
    (b"%PDF", "a PDF document"),
    *((bytes((0x80, protocol)), "a pickle, which is not read here: write it as JSON Lines") for protocol in range(2, 6)),
    (b"version https://git-lfs", "a Git LFS pointer, not the data itself: fetch it with git lfs pull"),
)  # fmt: skip
TABLES = _PARQUET, _ARROW_FILE, _ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
_ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"
ROWS = 4096  # of a table that are read at once
_SPACE = re.compile(r"[\s\ufeff]*")


class Unread(NamedTuple):
    """A cell of a column of Arrow's that has no value of Python's: it is refused if it is read. why: its type, and what is wrong."""

    why: str


class Repeated(dict[str, Any]):
    """A JSON object in which keys stand twice: `keys`. The last value of each is kept, as Python's json does."""

    keys_twice: frozenset[str] = frozenset()


def parse(path: str, content: bytes) -> list[Any]:
    """The records of a file's bytes. Raises UserError that says what the file is, or the line and what is wrong there."""
    if not content:
        raise UserError(f"{path} is empty")
    content = compression.unpacked(path, content)
    if content.startswith(TABLES):
        import pyarrow

        return list(itertools.chain.from_iterable(tables(path, pyarrow.BufferReader(content), content[:8])))
    if content[257:262] == b"ustar":
        raise UserError(f"{path} is a tar archive: unpack it and give the folder, or the file in it (expected {EXPECTED})")
    for mark, what in _OTHERS:
        if content.startswith(mark):
            raise UserError(f"{path} is {what} (expected {EXPECTED})")
    text = _decoded(path, content)
    start = _skip(text, 0)
    if start == len(text):
        raise UserError(f"{path} is empty")
    name = _named(path)
    if is_table(path, text[start : start + 1]):
        if text.startswith("<", start):
            raise UserError(f"{path} is no CSV: {_what(text, start)}")
        return list(rows(path, io.StringIO(text[start:], newline="")))
    if name.endswith((".parquet", ".arrow")):
        raise UserError(f"{path} is no {'Arrow' if name.endswith('.arrow') else 'Parquet'} file: {_what(text, start)}")
    if text[start] == "[":
        return _one_list(path, text, start)
    if text[start] == "{":
        return _objects(path, text, start, alone=name.endswith(".json"))
    what = _what(text, start)
    raise UserError(f"{path} {'holds no records' if what.startswith('it begins') else 'is no JSON'}: {what} (expected {EXPECTED})")


def is_table(path: str, text: str) -> bool:
    """Whether a file is a CSV, by its name and what its text begins with."""
    return _named(path).endswith((".csv", ".tsv")) and not text.startswith(("{", "["))


def objects(path: str, content: bytes, *, last: bool, count: int) -> list[Any]:
    """The objects of a piece of a file that ends between two; the `last` piece, or one that more follow; count: of those before it."""
    text = _decoded(path, content)
    return _objects(path, text, _skip(text, 0), alone=last and not count and _named(path).endswith(".json"))


def _named(path: str) -> str:
    """A path's or URL's name without what says how it is sent, to look at its end."""
    return compression.bare((path.split("?")[0] if "://" in path else path).lower())


def _decoded(path: str, content: bytes) -> str:
    encoding = next((name for mark, name in _BOMS if content.startswith(mark)), "utf-8")
    if encoding == "utf-8" and content[:2].count(0) == 1:
        raise UserError(f"{path} looks like UTF-16 without a byte-order mark: save it as UTF-8")
    called = encoding.upper().removesuffix("-SIG")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        if "truncated" in error.reason or (error.end >= len(content) and "end of data" in error.reason):
            raise UserError(f"{path}, line {line}: the file ends in the middle of a character: an incomplete download or copy?") from None
        raise UserError(
            f"{path}, line {line}: not {called} text (byte {error.start}, 0x{content[error.start]:02x}). If it is of Windows or Latin-1: "
            f"iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW"
        ) from None
    zero = text.find("\0")
    if zero >= 0:
        if not text.strip("\0 \r\n"):
            raise UserError(f"{path} holds nothing but zero bytes: a copy that was interrupted?")
        line = text.count("\n", 0, zero) + 1
        raise UserError(f"{path}, line {line}: a zero byte stands there: the file is damaged (a full disk, an interrupted copy?)")
    return text


def _skip(text: str, at: int) -> int:
    """The place of what follows white space and byte-order marks (files that were put behind one another hold some)."""
    found = _SPACE.match(text, at)
    return at if found is None else found.end()


def _integer(digits: str) -> float:
    try:
        return int(digits)
    except ValueError:  # Python converts no more than some thousand digits
        return float(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    marked, seen = Repeated(made), set[str]()
    marked.keys_twice = frozenset(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    return marked


_DECODER = json.JSONDecoder(parse_int=_integer, object_pairs_hook=_object)


def _value(path: str, text: str, at: int) -> tuple[Any, int]:
    """A JSON value that begins at `at`, and where it ends."""
    try:
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        first = text.count("\n", 0, at) + 1
        if error.lineno > first and text[at] == "{" and text.startswith("{", error.pos - error.colno + 1):
            raise UserError(f"{path}, line {first}: broken JSON: the line ends in the middle of its object") from None
        if error.msg.startswith("Unterminated string") or _skip(text, error.pos) == len(text):
            raise UserError(
                f"{path}, line {error.lineno}: broken JSON: the file ends in the middle of a record: an incomplete download or copy?"
            ) from None
        raise UserError(f"{path}, line {error.lineno}: broken JSON: {_why(text, error)}") from None
    except RecursionError:
        raise UserError(f"{path}, line {text.count(chr(10), 0, at) + 1}: a value here is nested too deeply to be read") from None


def _why(text: str, error: json.JSONDecodeError) -> str:
    """What is wrong, in the words of anyone who wrote the file; json's own where that is not known."""
    at = error.pos
    before, here = text[max(0, at - 200) : at].rstrip()[-1:], text[at : at + 5]
    if error.msg.startswith("Illegal trailing comma") or (before == "," and here[:1] in ("]", "}")):
        return "a comma before the closing bracket"
    if here.startswith("'"):
        return "single quotes, where JSON has double ones (Python's own notation? json.dumps writes JSON)"
    if here.startswith(("None", "True", "False")):
        return "None, True or False, where JSON has null, true and false (Python's own notation? json.dumps writes JSON)"
    if here.startswith(("//", "/*", "#")):
        return "a comment, which JSON does not have"
    if here[:1] in ("\u201c", "\u201d", "\u2018", "\u2019"):
        return "typographic quotation marks, where JSON has straight ones"
    if error.msg.startswith("Invalid control character"):
        return "a line break, tab or other control character inside of a text: JSON writes \\n, \\t, \\u00XX"
    if "escape" in error.msg:
        return f"a backslash inside of a text that begins nothing ({text[at : at + 6]!r}): JSON writes two for one"
    return error.msg


def _one_list(path: str, text: str, start: int) -> list[Any]:
    records, end = _value(path, text, start)
    rest = _skip(text, end)
    if rest < len(text):
        line = text.count("\n", 0, rest) + 1
        what = f"{text[rest : rest + 40]!r} follows the list"
        if text[rest] == "[" and "\n" in text[end:rest] and "\n" not in text[start:end]:
            what = 'each line is a list, where a record is an object (of a conversation: {"messages": […]})'
        elif text[rest] == "[":
            what = "another list begins behind the first: make one of them"
        raise UserError(f"{path}, line {line}: {what}")
    assert isinstance(records, list)
    return records


def _objects(path: str, text: str, start: int, *, alone: bool) -> list[Any]:
    """One object a line, or objects over several lines behind one another. alone: a single one is no file of records."""
    records: list[Any] = []
    at = start
    while at < len(text):
        if records and text[at] != "{":
            line = text.count("\n", 0, at) + 1
            why = (
                "a comma behind the object: one object a line has none; with commas, [ and ] stand around them all"
                if text[at] == ","
                else f"broken JSON: expected an object, found {text[at : at + 40]!r}"
            )
            raise UserError(f"{path}, line {line}: {why}")
        record, end = _value(path, text, at)
        records.append(record)
        at = _skip(text, end)
    if len(records) == 1 and alone:
        raise UserError(f"{path}: expected a JSON list of records, got one object{_inside(records[0])}")
    return records


def _inside(record: dict[str, Any]) -> str:
    """What a single object seems to be instead of records."""
    values = list(record.values())
    lists = [key for key, value in record.items() if isinstance(value, list) and value and all(isinstance(v, dict) for v in value)]
    if lists and any("role" in message or "from" in message for message in record[lists[0]]):
        return f", a conversation by its {lists[0]!r}: put it into [ and ] if it is the only one"
    if lists:
        return f": the records seem to lie under {lists[0]!r}: write that list alone"
    if values and all(isinstance(v, dict) and v.keys() == values[0].keys() for v in values) and not all(map(str.isdigit, values[0])):
        first = ", ".join(list(record)[:3])
        return f": the records seem to lie under keys of their own ({first} …): write a list of them, without these keys"
    if values and all(isinstance(v, dict | list) for v in values):
        return ", a column under each key: pandas writes records with to_json(…, orient='records')"
    return f" (with the keys {', '.join(record)}): put it into [ and ] if it is the only record"


def _what(text: str, start: int) -> str:
    """What a text is that is no JSON."""
    head = text[start : start + 4000]
    lines = head.splitlines()
    if head[:200].lower().lstrip().startswith(("<!doctype html", "<html", "<head")) or "<html" in head.lower():
        title = re.search(r"<title[^>]*>\s*([^<]{1,100})", head, re.IGNORECASE)
        return f"it is an HTML page{f' ({title[1].strip()!r})' if title else ''}: a download that failed, or that wants a login"
    if head.startswith("<"):
        return f"it is XML or another markup ({head[:40]!r})"
    for mark, name in ((",", "CSV: name it .csv"), ("\t", "a table with tabs: name it .tsv"), (";", "CSV: name it .csv")):
        if len(lines) > 1 and all(mark in line for line in lines[:2]) and all(len(c) <= 40 for c in lines[0].split(mark)):
            return f"it looks like {name}"
    if len(lines) > 1 and re.match(r"(- |---$|[\w-]+:(\s|$))", lines[0]):
        return f"it looks like YAML ({lines[0][:40]!r})"
    return f"it begins with {head[:60]!r}"


def rows(path: str, lines: Iterable[str]) -> Iterator[Any]:
    """A CSV file's rows. Every cell is text: nothing is taken for a number or for a missing value."""
    lines = iter(lines)
    header = next(lines, "")
    mark = "\t" if _named(path).endswith(".tsv") else max(",;\t", key=header.count)
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(itertools.chain([header], lines), delimiter=mark, strict=True)
    try:
        names = reader.fieldnames or []
        _check_names(path, names)
        for row in reader:
            if None in row or None in row.values():
                more = "more" if None in row else "fewer"
                raise UserError(
                    f"{path}, line {reader.line_num}: the row has {more} cells than the {len(names)} columns: a text with a "
                    f"{'tab' if mark == chr(9) else mark!r} or a line break in it stands between double quotes"
                )
            yield row
    except csv.Error as error:
        why = "a double quote opens a text and none closes it" if "unexpected end" in str(error) else str(error)
        raise UserError(f"{path}, line {reader.line_num + 1}: broken CSV: {why}") from None


def tables(path: str, source: Any, start: bytes) -> Iterator[list[Any]]:
    """The rows of a file that begins so: Parquet, or Arrow's IPC, as a file or as a stream (as `datasets` writes its own); batch by batch.
    source: pyarrow's, of the file. Raises UserError."""
    import pyarrow
    import pyarrow.parquet

    kind = "a Parquet file" if start.startswith(_PARQUET) else "an Arrow file"
    try:
        if start.startswith(_PARQUET):
            batches = pyarrow.parquet.ParquetFile(source).iter_batches(batch_size=ROWS)
        elif start.startswith(_ARROW_FILE):
            opened = pyarrow.ipc.open_file(source)
            batches = (opened.get_batch(number) for number in range(opened.num_record_batches))
        else:
            source.seek(max(0, source.size() - len(_ARROW_END)))
            if source.read() != _ARROW_END:  # a stream may end between any two batches: Arrow would read it as whole
                raise UserError(f"{path}: an Arrow stream without the mark of its end: cut off?")
            source.seek(0)
            batches = iter(pyarrow.ipc.open_stream(source))
        for batch in batches:
            table = pyarrow.Table.from_batches([batch])
            for first in range(0, len(table), ROWS):
                yield _objects_of(path, table.slice(first, ROWS))
    except (UserError, GeneratorExit):
        raise
    except Exception as error:
        raise UserError(f"{path}: {kind}, and damaged or cut off ({first_line(error)})") from error


def _objects_of(path: str, table: Any) -> list[Any]:
    """The rows of a table of Arrow's. Raises what Arrow does where it is not whole."""
    table.validate()
    _check_names(path, table.column_names)  # rows are objects: one of two would be lost
    cells = zip(*map(_cells, table.columns), strict=True)
    return [dict(zip(table.column_names, row, strict=True)) for row in cells]


def _cells(column: Any) -> list[Any]:
    """A column's values; of one that has none, or is damaged, what is wrong."""
    try:
        column.validate(full=True)
        return list(column.to_pylist())
    except Exception as error:  # noqa: BLE001  (a time zone that is not known, a year after 9999, a byte that is not UTF-8)
        return [Unread(f"{column.type}: {first_line(error)}")] * len(column)


def _check_names(path: str, names: Sequence[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path}: two columns are called {twice!r}")
