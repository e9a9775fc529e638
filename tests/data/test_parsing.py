"""Files that are read whatever they are called, and what the others are said to be: the words are held against the cause."""

import bz2
import gzip
import json
import lzma
import random

import pyarrow
import pyarrow.parquet
import pytest

from moejax.config_data import DataConfig
from moejax.data.parsing import parse
from moejax.data.sources import load_records
from moejax.errors import UserError
from moejax.estimator import lengths

A = {"instruction": "Add 1 and 2.", "input": "", "output": "3 é"}
B = {"instruction": "Add\n2, \"and\" 3.", "input": None, "output": "NA"}
LIST, LINES = json.dumps([A, B], ensure_ascii=False), f"{json.dumps(A)}\n{json.dumps(B)}\n"


def parquet(records):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), sink)
    return sink.getvalue().to_pybytes()


def arrow(records, kind=pyarrow.ipc.new_file):
    sink, table = pyarrow.BufferOutputStream(), pyarrow.Table.from_pylist(records)
    with kind(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    return sink.getvalue().to_pybytes()


def gzipped(content):
    return gzip.compress(content, mtime=0)  # the bytes are names of tests: every process has to collect the same ones


def zstd(content):
    return pyarrow.compress(content, "zstd", asbytes=True)


STREAM = arrow([A, B], pyarrow.ipc.new_stream)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.json", b"\xef\xbb\xbf" + LIST.encode()),
        ("bom.jsonl", LINES.encode("utf-8-sig")),
        ("two_boms.jsonl", json.dumps(A).encode("utf-8-sig") + b"\n" + json.dumps(B).encode("utf-8-sig")),
        ("utf16.json", LIST.encode("utf-16")),
        ("utf16be.json", b"\xfe\xff" + LIST.encode("utf-16-be")),
        ("utf32.jsonl", LINES.encode("utf-32")),
        ("lines.json", LINES.encode()),
        ("list.jsonl", LIST.encode()),
        ("pretty.json", f"{json.dumps(A, indent=2)}\n{json.dumps(B, indent=2)}".encode()),
        ("crlf.jsonl", LINES.replace("\n", "\r\n\r\n").encode()),
        ("upper.JSONL", LINES.encode()),
        ("packed.jsonl.gz", gzipped(LINES.encode())),
        ("packed.json", gzipped(LIST.encode())),
        ("packed.jsonl.zst", zstd(LINES[: LINES.index("\n")].encode()) + zstd(LINES[LINES.index("\n") :].encode())),
        ("packed.jsonl.bz2", bz2.compress(LINES.encode())),
        ("packed.jsonl.xz", lzma.compress(LINES.encode())),
        ("packed.csv.zst", zstd(b'instruction,input,output\nAdd 1 and 2.,,3 \xc3\xa9\n"Add\n2, ""and"" 3.",,NA\n')),
        ("a.arrow", arrow([A, B])),
        ("stream.arrow", STREAM),
        ("arrow.json", gzipped(arrow([A, B]))),
        ("no_suffix", LINES.encode()),
        ("separators.jsonl", LINES.replace("}\n", ', "x": "\u2028"}\n').encode()),
        ("huge.jsonl", LINES.replace("}\n", ', "id": ' + "7" * 5000 + ', "nan": [NaN, Infinity, 1e999]}\n').encode()),
        ("a.parquet", parquet([A, B])),
        ("parquet.json", parquet([A, B])),
        ("a.csv", b'instruction,input,output\nAdd 1 and 2.,,3 \xc3\xa9\n"Add\n2, ""and"" 3.",,NA\n'),
        ("excel.csv", b'\xef\xbb\xbfinstruction;input;output\r\nAdd 1 and 2.;;3 \xc3\xa9\r\n"Add\n2, ""and"" 3.";;NA\r\n'),
        ("a.tsv", b'instruction\tinput\toutput\nAdd 1 and 2.\t\t3 \xc3\xa9\n"Add\n2, ""and"" 3."\t\tNA\n'),
        ("lines.csv", LINES.encode()),
    ],
)
def test_read_whatever_it_is_called(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    texts = [(r["instruction"], r["input"], r["output"]) for r in load_records(DataConfig(source=str(path)))]
    assert texts == [(r["instruction"], r["input"] or "", r["output"]) for r in (A, B)]


DEEP = b'{"meta": ' + b"[" * 20000 + b"]" * 20000 + b"}"
FAULTS = [
    ("a.jsonl", b"", "is empty"),
    ("a.jsonl", b"\xef\xbb\xbf\n \n", "is empty"),
    ("a.json", b"\0" * 99, "nothing but zero bytes"),
    ("a.json", LIST.encode("utf-16-le"), "looks like UTF-16 without a byte-order mark"),
    ("a.jsonl", LINES.encode() + b"\0\0", r"line 3: a zero byte .* damaged"),
    ("a.jsonl", LINES.encode() + '{"output": "é"}'.encode("latin-1"), r"line 3: not UTF-8 text \(byte \d+, 0xe9\).*iconv"),
    ("a.json", LIST.encode()[: LIST.encode().index(b"\xa9")], "line 1: the file ends in the middle of a character"),
    ("a.json", LIST.encode()[:-9], "line 1: broken JSON: the file ends in the middle of a record"),
    ("a.json", b'[{"a": "b"},\n', "line 2: broken JSON: the file ends in the middle"),
    ("a.jsonl", LINES.encode()[:-5], "line 2: broken JSON: the file ends in the middle of a record"),
    ("a.jsonl", b'{"a": 1\n{"a": 2}\n', "line 1: broken JSON: the line ends in the middle of its object"),
    ("a.json", b'[\n{"a": 1},\n]', r"line 2|line 3: broken JSON: a comma before the closing bracket"),
    ("a.json", b'[\n{"a": 1,}]', "line 2: broken JSON: a comma before the closing bracket"),
    ("a.json", b'{"a": 1},\n{"a": 2},\n', "line 1: a comma behind the object: one object a line has none"),
    ("a.jsonl", b'{"a": 1}\noops', "line 2: broken JSON: expected an object, found 'oops'"),
    ("a.json", b"[{'a': 1}]", "line 1: broken JSON: single quotes"),
    ("a.json", b'[{"a": None}]', "None, True or False, where JSON has null"),
    ("a.json", b'[\n// mine\n{"a": 1}]', "line 2: broken JSON: a comment"),
    ("a.json", '[{“a”: 1}]'.encode(), "typographic quotation marks"),
    ("a.jsonl", b'{"a": "b\tc"}', r"control character inside of a text"),
    ("a.jsonl", b'{"a": "C:\\data"}', r"a backslash inside of a text"),
    ("a.json", LIST.encode() + LIST.encode(), "line 1: another list begins behind the first"),
    ("a.json", LIST.encode() + b"x", "line 1: 'x' follows the list"),
    ("a.jsonl", LINES.encode() + DEEP, "line 3: a value here is nested too deeply"),
    ("a.json", b"[" * 99999, "line 1: a value here is nested too deeply"),
    ("a.json", b'{"version": 1, "data": [{"a": 1}]}', "got one object: the records seem to lie under 'data'"),
    ("a.json", b'{"a": {"0": "x"}, "b": {"0": "y"}}', r"a column under each key: .*orient='records'"),
    ("a.json", b"<!DOCTYPE html>\n<html><head><title>Sign in</title>", r"is no JSON: it is an HTML page \('Sign in'\)"),
    ("a.parquet", b"<html>", "is no Parquet file: it is an HTML page"),
    ("a.json", b"<?xml version='1.0'?>", "it is XML"),
    ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer, not the data itself"),
    ("a.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer, not the data itself"),
    ("a.json", b"instruction,output\na,b\n", "it looks like CSV: name it .csv"),
    ("a.json", b"instruction\toutput\na\tb\n", "a table with tabs: name it .tsv"),
    ("a.json", b"- instruction: a\n  output: b\n", "it looks like YAML"),
    ("a.json", b"404: Not Found", "holds no records: it begins with '404: Not Found'"),
    ("a.json", b"Access to this is restricted, please log in", "it begins with 'Access to this"),
    ("a.jsonl.zst", zstd(LINES.encode())[:-3], "compressed with zstd, and damaged or cut off"),
    ("a.jsonl", b"\x28\xb5\x2f\xfd\x00", "compressed with zstd, and damaged or cut off"),
    ("a.jsonl.bz2", bz2.compress(LINES.encode())[:-3], "compressed with bzip2, and damaged or cut off"),
    ("a.jsonl.xz", lzma.compress(LINES.encode())[:-3], "compressed with xz, and damaged or cut off"),
    ("a.jsonl.gz", gzipped(b""), r"is empty, once it is unpacked \(gzip\)"),
    ("a.tar.gz", gzipped(b"a.json".ljust(257, b"\0") + b"ustar\0" + bytes(249)), "is a tar archive: unpack it"),
    ("a.arrow", arrow([A])[:-9], "an Arrow file, and damaged or cut off"),
    ("a.arrow", STREAM[:-8], "an Arrow stream without the mark of its end"),
    ("a.arrow", b"404: Not Found", "is no Arrow file: it begins with"),
    ("a.parquet", parquet([A])[:200], "a Parquet file, and damaged or cut off"),
    ("a.json", b"PK\x03\x04\x14\x00\x00\x00", "is a zip archive"),
    ("a.xlsx", b"PK\x03\x04\x14\x00\x06\x00", "is an Excel workbook"),
    ("a.jsonl.gz", gzipped(LINES.encode())[:-12], "compressed with gzip, and damaged or cut off"),
    ("a.parquet", parquet([A])[:-9], "a Parquet file, and damaged or cut off"),
    ("a.csv", b"instruction,output\na,b,c\n", "line 2: the row has more cells than the 2 columns"),
    ("a.csv", b"instruction,output\na\n", "line 2: the row has fewer cells"),
    ("a.csv", b"a,a\n1,2\n", "two columns are called 'a'"),
    ("a.csv", b'instruction,output\n"a,b\n', "line 2: broken CSV: a double quote opens a text and none closes it"),
    ("a.jsonl", '{"a": 1}'.encode("utf-16")[:-1], "line 1: the file ends in the middle of a character"),
    ("a.json", b'{"messages": [{"role": "user", "content": "a"}]}', r"a conversation by its 'messages': put it into \[ and \]"),
    ("a.csv", b"<!DOCTYPE html>\n<html>", "is no CSV: it is an HTML page"),
    ("a.json", b'{"0": {"output": "x"}, "1": {"output": "y"}}', r"the records seem to lie under keys of their own \(0, 1 …\)"),
    ("a.jsonl", b'[{"role": "user"}]\n[{"role": "user"}]\n', r"line 2: each line is a list, where a record is an object \(of a"),
    ("a.jsonl.gz", gzipped(gzipped(LINES.encode())), r"is compressed twice \(gzip in gzip\): unpack it once"),
    ("a.json", b"null", "holds no records: it begins with 'null'"),
]


@pytest.mark.parametrize(("name", "content", "told"), FAULTS)
def test_the_message_names_the_cause(name, content, told):
    with pytest.raises(UserError, match=told) as caught:
        parse(name, content)
    assert str(caught.value).startswith(name)


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ('{"instruction": "a", "output": "b\\ud83d"}', r"record 1: 'output' holds half of a surrogate pair.*'\\ud83d' at character 1"),
        ('{"instruction": "a", "input": "\\udc00", "output": "b"}', "record 1: 'input' holds half"),
        ('{"instruction": null, "output": "b"}', "record 1: no text under 'instruction', but null"),
        ('{"instruction": "a", "output": 3}', "record 1: no text under 'output', but a number"),
        ('{"instruction": "a", "output": ["b"]}', "no text under 'output', but a list"),
        ('{"instruction": "a", "output": {"text": "b"}}', "no text under 'output', but an object"),
        ('{"instruction": "a", "output": true}', "no text under 'output', but true or false"),
        ('{"instruction": "a", "input": NaN, "output": "b"}', "no text under 'input', but NaN"),
        ('{"instruction": "a", "input": 0, "output": "b"}', "no text under 'input', but a number"),
        ('{"instruction": "a", "input": false, "output": "b"}', "no text under 'input', but true or false"),
        ('{"instruction": "a", "input": [], "output": "b"}', "no text under 'input', but a list"),
        ('{"instruction": "a"}', r"no text under 'output' \(it has instruction\)"),
        ('{"instruction": "a", "output": "b", "output": "c"}', "'output' stands in it twice"),
        ('{" output": "a"}', r"no text under 'output' \(it has ' output'\)"),
        ("{}", r"no text under 'output' \(it has no keys\)"),
        ("[1]", "record 1: expected an object, got a list"),
        ("null", "record 1: expected an object, got null"),
    ],
)
def test_a_record_is_text_or_refused_by_its_number(record, told, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(f"[{json.dumps(A)}, {record}]")
    with pytest.raises(UserError, match=told) as caught:
        load_records(DataConfig(source=str(path)))
    assert str(caught.value).startswith(f"{path}, record 1")


KINDS = {"file": arrow([A] * 50), "stream": STREAM, "parquet": parquet([A] * 50), "zstd": zstd(LINES.encode() * 9)}


@pytest.mark.parametrize("content", KINDS.values(), ids=KINDS)
def test_a_file_that_was_cut_or_damaged_is_refused_or_read_whole(content):
    """No bytes end it with another error than one that names the file; where a cut is not seen, nothing is missing."""
    whole, draw = parse("a", content), random.Random(0)
    for at in {draw.randrange(len(content)) for _ in range(40)}:
        for changed in (content[:at], content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]):
            try:
                assert len(parse("a", changed)) == len(whole)
            except UserError as error:
                assert str(error).startswith("a")


def test_columns_of_one_name(tmp_path):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table([["a"], ["b"]], names=["output", "output"]), sink)
    with pytest.raises(UserError, match="two columns are called 'output'"):
        parse("a.parquet", sink.getvalue().to_pybytes())


def test_only_a_column_that_is_read_refuses_a_table(tmp_path):
    """Arrow's values that Python has none for, and a text that is no UTF-8."""
    broken = pyarrow.StringArray.from_buffers(2, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xffa"))
    when, far = (pyarrow.array([1, 2**40], pyarrow.timestamp("s", tz=zone)) for zone in ("Mars/Olympus", None))
    columns = {"when": when, "far": far, "broken": broken, "question": ["a", "b"], "answer": ["c", "d"]}
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    assert [record["output"] for record in load_records(DataConfig(source=str(path)))] == ["c", "d"]
    for name, told in (("when", r"timestamp\[.*, tz=Mars/Olympus\]"), ("broken", "string: .*UTF8"), ("far", "timestamp.*range")):
        with pytest.raises(UserError, match=rf"record 0: no text under '{name}', but cells without a value \({told}"):
            load_records(DataConfig(source=str(path), fields={"output": name}))


@pytest.mark.parametrize("text", ["[" * 9999, "9" * 5000, "[" + "9" * 400 + "]"])
def test_lengths_that_are_none(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match="--lengths"):
        lengths.from_file(tmp_path / "a.json")
