"""data.streaming: the same batches, notes and messages as without it, in memory that does not grow with the file."""

import bz2
import gzip
import json
import lzma
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from support import ROOT

from moejax.config_data import DataConfig
from moejax.data import parsing, pipeline, windows
from moejax.data.shelf import Shelf
from moejax.data.sources import load_sources
from moejax.data.tokenizer import load_tokenizer
from moejax.errors import UserError

RECORDS = [{"instruction": f"What is {n} + 1?" + " Say it." * (n % 7), "output": f"It is {n + 1}.\n\u00e9"} for n in range(60)]
TEXT = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(windows, "BYTES", 700)
    monkeypatch.setattr(parsing, "ROWS", 7)
    monkeypatch.setattr(pipeline, "WINDOW", 5)


def written(folder, name):
    path, kind = folder / name, name.split(".")[1]
    content = {"jsonl": TEXT, "json": "\n".join(json.dumps(record, indent=2) for record in RECORDS)}.get(kind, "").encode()
    table = pyarrow.Table.from_pylist(RECORDS)
    if kind == "csv":
        quoted = ('","'.join(record.values()) for record in RECORDS)
        content = ("\ufeffinstruction,output\r\n" + "".join(f'"{row}"\r\n' for row in quoted)).encode()
    elif kind == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=11)
        return path
    elif kind == "arrow":
        opened = pyarrow.ipc.new_stream if "stream" in name else pyarrow.ipc.new_file
        with opened(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=13)
        return path
    packed = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": lambda c: pyarrow.compress(c, "zstd", asbytes=True)}
    path.write_bytes(packed.get(name.split(".")[-1], bytes)(content))
    return path


KINDS = ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow", "stream.arrow", "a.jsonl.gz", "a.jsonl.bz2", "a.csv.xz", "a.jsonl.zst"]


@pytest.mark.parametrize("name", KINDS)
def test_windows_hold_what_the_whole_file_does(name, tmp_path):
    path = written(tmp_path, name)
    found = list(windows.windows(str(path)))
    assert len(found) > 3 and all(found[:-1])
    assert [record for window in found for record in window] == parsing.parse(str(path), path.read_bytes()) == RECORDS


def test_the_same_batches_table_and_notes(tmp_path):
    """Two files with weights, records of two schemas, duplicates and a hold-out: to the bit."""
    one, two = written(tmp_path, "a.jsonl"), tmp_path / "b.jsonl"
    mixed = [{"question": "1?", "answer": "One."}, {"instruction": "What?", "output": "</s>"}] * 8
    two.write_text("".join(json.dumps(record) + "\n" for record in mixed))
    tokenizer = load_tokenizer(str(ROOT / "assets/tiny-mixtral"))
    source = [{"source": str(one), "weight": 0.5}, str(two)]
    settings = {"source": source, "template": "mistral", "row_tokens": 64, "max_length": 48, "batch_rows": 2, "holdout": 9}
    plain, streamed = (
        pipeline.load(DataConfig.model_validate(settings | {"streaming": on}), tokenizer, 3, 512) for on in (False, True)
    )
    assert isinstance(streamed.train.queries, Shelf) and not isinstance(plain.train.queries, Shelf)
    assert (streamed.document(), streamed.contents) == (plain.document(), plain.contents)
    for epoch in (0, 1):
        for a, b in zip(plain.train.iterate(epoch, 1), streamed.train.iterate(epoch, 1), strict=True):
            assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    held = [list(dataset.evaluation.iterate(0)) for dataset in (plain, streamed)]
    assert all(np.array_equal(x, y) for a, b in zip(*held, strict=True) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TEXT + '{"a": 1,}\n', r"line 61: broken JSON: a comma before the closing bracket"),
        (TEXT + '{"a": "b\n', r"line 61: broken JSON"),
        ("[" + TEXT.replace("\n", ",\n")[:-2] + "]", r"is one JSON list, which can only be read whole: write an object a line"),
        (TEXT.encode("utf-16"), r"is UTF-16, which data\.streaming does not read"),
        ("<html><title>Sign in</title>", r"it is an HTML page \('Sign in'\)"),
        (gzip.compress(TEXT.encode(), mtime=0)[:-60], r"compressed with gzip, and damaged or cut off"),
        ("", r"is empty"),
    ],
)
def test_what_cannot_be_read(content, message, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        list(windows.windows(str(path)))


def test_a_shelf_is_a_list():
    items = [{"a": [n]} for n in range(200)]
    shelf = Shelf(items[:150])
    assert shelf[3] == items[3]
    shelf.extend(items[150:])
    assert list(shelf) == items and shelf[-1] == items[-1] and len(shelf) == 200
    assert list(shelf[20:90]) == items[20:90] and list(shelf[50:60][2:4]) == items[52:54] and list(shelf[5:2]) == []
    with pytest.raises(IndexError):
        shelf[200]


def test_a_folder_of_many_files_takes_few_open_ones(tmp_path):
    for number in range(80):
        (tmp_path / f"{number:03}.jsonl").write_text(json.dumps(RECORDS[number % 60]))
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    config = DataConfig(source=str(tmp_path), template="mistral", streaming=True)
    found = load_sources(config)
    assert len(list(Path("/proc/self/fd").iterdir())) < open_files + 10
    assert list(found[0].records) == list(load_sources(config.model_copy(update={"streaming": False}))[0].records)


def test_a_full_disk_is_told():
    shelf = Shelf()
    shelf.append("x")
    shelf._file.close()
    with Path("/dev/full").open("wb", buffering=0) as full:
        shelf._file = full
        with pytest.raises(UserError, match=r"data\.streaming keeps records there, and it cannot be written \(No space left.*TMPDIR"):
            list(shelf)


def test_a_folder_for_records_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/nowhere")
    with pytest.raises(UserError, match="TMPDIR = /nowhere is no folder"):
        Shelf()


CHILD = """
import resource, sys
from moejax.config_data import DataConfig
from moejax.data import pipeline, windows
from moejax.data.tokenizer import load_tokenizer
windows.BYTES, pipeline.WINDOW = 1 << 20, 256
tokenizer = load_tokenizer(sys.argv[2])
def batches(name, streaming):
    data = DataConfig(source=f"{sys.argv[1]}/{name}", template="text", max_length=64, row_tokens=64, streaming=streaming)
    return pipeline.load(data, tokenizer, 0, 512).train.batches_per_epoch(0)
batches("small.jsonl", True)
held = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (held * 1024 + 30_000_000,) * 2)
print(batches("large.jsonl", True) > 50)
try:
    batches("large.jsonl", False)
except MemoryError:
    print("too much")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on what a process may hold")
def test_memory_does_not_grow_with_the_file(tmp_path):
    """A file of 60 MB in 30 MB more than one of a few lines takes; read whole it is too much."""
    line = json.dumps({"text": "Two and two are four.", "other": "x" * 20_000}) + "\n"
    (tmp_path / "small.jsonl").write_text(line * 3)
    with (tmp_path / "large.jsonl").open("w") as file:
        file.writelines(line for _ in range(3000))
    command = [sys.executable, "-c", CHILD, str(tmp_path), str(ROOT / "assets/tiny-mixtral")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split("\n") == ["True", "too much", ""], done.stderr
