"""What a source may name, in which order it is read, and what is said where that is nothing."""

import gzip
import json

import datasets
import pytest

from moejax.data import places
from moejax.errors import UserError


def write(path, *texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)


def texts(name, split=None):
    return [record["text"] for part in places.read(str(name), None, split, "data.source").parts for record in part.records]


def test_a_folder_and_a_glob_are_read_in_the_order_of_their_names(tmp_path):
    for name, text in (
        ("b.jsonl", "third"), ("a/z.jsonl", "second"), ("a/b/c.jsonl.gz", "first"), (".hidden/x.jsonl", "no"), ("c.md", "no"),
    ):  # fmt: skip
        write(tmp_path / name, text)
    found = places.read(str(tmp_path), None, "train", "data.source")
    assert [part.records[0]["text"] for part in found.parts] == ["first", "second", "third"]
    assert found.parts[0].name == str(tmp_path / "a/b/c.jsonl.gz") and found.notes == [f"{tmp_path}: not read, of another kind: c.md"]
    assert texts(f"{tmp_path}/**/*.jsonl*") == ["first", "second", "third"]
    assert texts(f"{tmp_path}/a/?.jsonl") == ["second"]
    write(tmp_path / "odd[1].jsonl", "a name, not a pattern")
    assert texts(tmp_path / "odd[1].jsonl") == ["a name, not a pattern"]


def test_splits_are_words_in_names(tmp_path):
    for name in ("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl", "dev/a.jsonl"):
        write(tmp_path / name, name)
    assert texts(tmp_path) == ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]
    assert texts(tmp_path, "test") == ["data/test-00000-of-00001.jsonl"] and texts(tmp_path, "validation") == ["dev/a.jsonl"]
    notes = places.read(str(tmp_path), None, None, "data.source").notes
    assert notes == [f"{tmp_path}: not read, of another split, by name: data/test-00000-of-00001.jsonl, dev/a.jsonl"]
    with pytest.raises(UserError, match=r"no file of the split 'test', by name: it has train-00000"):
        (tmp_path / "data/test-00000-of-00001.jsonl").unlink()
        texts(tmp_path / "data", "test")


def test_what_datasets_wrote(tmp_path):
    one = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    one.select([1]).save_to_disk(str(tmp_path / "one"))  # an older fsspec takes no Path
    datasets.DatasetDict({"train": one, "held": one.select([0])}).save_to_disk(str(tmp_path / "several"))
    assert texts(tmp_path / "one") == ["b"]
    assert (texts(tmp_path / "several"), texts(tmp_path / "several", "held")) == (["a", "b"], ["a"])
    with pytest.raises(UserError, match="has the splits train, held, and no 'test'"):
        texts(tmp_path / "several", "test")
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"ARROW1")
    with pytest.raises(UserError, match="a folder that `datasets` wrote, and damaged"):
        texts(tmp_path / "one")


def test_a_folder_whose_readme_names_its_files_is_for_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "d/x.jsonl", "x")
    write(tmp_path / "d/y.jsonl", "y")
    (tmp_path / "d/README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: y.jsonl\n---\n")
    assert texts(tmp_path / "d", "train") == ["y"]


def test_nothing_there(tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "other/notes.md", "x")
    for name, told in (
        ("empty", r"is a folder without a data file \(it is empty\): expected a \.json"),
        ("other", r"without a data file \(it has notes\.md\)"),
        ("none*.jsonl", r"data\.source .*none\*\.jsonl: no file has such a name"),
        ("none.jsonl", r"data file .*none\.jsonl does not exist \(data\.source: a \.json"),
    ):
        with pytest.raises(UserError, match=told):
            texts(tmp_path / name)
    assert not places.is_here(str(tmp_path / "none*.jsonl")) and places.is_here(str(tmp_path / "*/notes.md"))
    assert places.is_file("none*.jsonl") and not places.is_file("owner/name")


def test_one_file_of_several_is_named(tmp_path):
    write(tmp_path / "a.jsonl", "fine")
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\n{oops\n')
    with pytest.raises(UserError, match=r"b\.jsonl, line 2: broken JSON"):
        texts(tmp_path)
    with pytest.raises(UserError, match=r"holds 2 files: data\.bytes and data\.sha256 are of one file"):
        places.read(str(tmp_path), None, None, "data.source", lambda name, content: None)


def test_a_split_that_chooses_nothing_is_said(tmp_path):
    write(tmp_path / "a.jsonl", "a")
    for name, told in ((tmp_path, "no file's name has a split, so 'test'"), (tmp_path / "a.jsonl", "no folder, so its split 'test'")):
        found = places.read(str(name), None, "test", "data.source")
        assert len(found.parts) == 1 and told in found.notes[0]
        assert places.read(str(name), None, "train", "data.source").notes == []


def test_a_file_without_records_among_others_is_said(tmp_path):
    write(tmp_path / "a.jsonl", "a")
    (tmp_path / "b.json").write_text("[]")
    (tmp_path / "c.csv").write_text("text\n")
    notes = places.read(str(tmp_path), None, None, "data.source").notes
    assert notes == [f"{tmp_path}: 2 of 3 files without a record, first {tmp_path}/b.json"]
    (tmp_path / "d.jsonl").touch()
    with pytest.raises(UserError, match=r"d\.jsonl is empty"):
        texts(tmp_path)
