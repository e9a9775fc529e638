"""Several sources with weights: who is seen how often, in which order, and what is counted of each."""

import json
from collections import Counter

import numpy as np
import pytest
from data.chat_templates import make
from support import ROOT

from moejax.config import DataConfig, Experiment, dump, load
from moejax.data.batching import Batches
from moejax.data.pipeline import load as load_data
from moejax.data.sources import load_sources, parted
from moejax.data.tokenize import Query
from moejax.data.tokenizer import load_tokenizer
from moejax.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(ROOT / "assets/tiny-mixtral"))


@pytest.fixture
def files(tmp_path):
    """Ten questions in a file, four in another, with columns of other names."""
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    a.write_text("".join(json.dumps({"question": f"a{n}", "answer": "yes"}) + "\n" for n in range(10)))
    b.write_text("".join(json.dumps({"prompt": f"b{n}", "completion": "no"}) + "\n" for n in range(4)))
    return str(a), str(b)


def section(source, **more):
    return DataConfig(source=source, row_tokens=64, max_length=64, **more)


def epochs(weights, count, seed=0, **more):
    """Which queries each of `count` epochs has, in order."""
    queries = [Query.after(0, np.full(8, n, np.int32)) for n in range(sum(n for n, _ in weights))]
    batches = Batches(queries, section("x", batching="pad_longest", **more), seed, weights=weights)
    return [[int(batch.tokens[0, 0]) for batch in batches.iterate(epoch)] for epoch in range(count)]


def test_a_weight_is_how_often_a_record_is_seen_an_epoch():
    seen = epochs([(10, 2.0), (4, 0.5), (3, 1.0)], 4)
    for epoch in seen:
        counts = Counter(epoch)
        assert all(counts[n] == 2 for n in range(10)) and all(counts[n] == 1 for n in range(14, 17))
        assert sum(counts[n] for n in range(10, 14)) == 2
    assert {n for n in seen[0] if 10 <= n < 14} | {n for n in seen[1] if 10 <= n < 14} == {10, 11, 12, 13}
    total = Counter(n for epoch in epochs([(7, 0.3), (5, 1.7)], 10) for n in epoch)
    assert [total[n] for n in range(12)] == [3] * 7 + [17] * 5


def test_the_order_is_of_the_seed_and_the_epoch():
    weights = [(10, 1.5), (4, 0.5)]
    assert epochs(weights, 3) == epochs(weights, 3) != epochs(weights, 3, seed=1)
    assert epochs([(10, 1.0), (4, 1.0)], 2) == epochs([(14, 1.0)], 2)
    first = epochs(weights, 1, shuffle=False)[0]
    assert first == sorted(first)


def test_sources_are_read_counted_and_reported_apart(files, tokenizer):
    a, b = files
    config = section([{"source": a, "weight": 0.5}, b, {"source": a, "fields": {"instruction": "answer", "output": "question"}}])
    data = load_data(config, tokenizer, 0, 512)
    assert [list(one.counts().values())[:4] for one in data.sources] == [[a, 0.5, 10, 0], [b, 1.0, 4, 0], [a, 1.0, 10, 0]]
    assert [row[:3] for row in data.by_source()[0].rows] == [[a, "0.5", "10"], [b, "1", "4"], [a, "1", "10"]]
    assert data.statistics()["records"] == 24 and data.train.rows() == len(data.train._rows(0))
    assert f"columns of {b}: instruction: 'prompt', output: 'completion' (by name; data.fields names others)" in data.notes()
    twice = load_data(section([a, a]), tokenizer, 0, 512)
    assert [one.duplicates for one in twice.sources] == [0, 10] and twice.statistics()["duplicate"] == 10


def test_contents_are_of_all_sources_and_their_weights(files, tokenizer):
    a, b = files

    def content(source):
        return load_data(section(source), tokenizer, 0, 512).contents["data"]

    assert content([a]) == content(a) != content([a, b])
    assert len({content(source) for source in ([a, b], [b, a], [a, {"source": b, "weight": 2}], [{"source": a, "weight": 2}])}) == 4


def test_what_is_held_out_comes_from_each(files):
    train, held = parted(load_sources(section(list(files))), 7)
    assert [[one.count for one in sources] for sources in (train, held)] == [[5, 2], [5, 2]]
    assert held[0].parts[0].records[0]["instruction"] == "a5" and held[0].parts[0].first == 5


def test_a_config_with_several_is_written_as_it_is_read(files, tmp_path):
    a, b = files
    written = f"data.source=[{{source: {a}, weight: 2, split: test}}, {b}]"
    experiment = load(ROOT / "configs/demo.yaml", [written])
    (tmp_path / "c.yaml").write_text(dump(experiment))
    assert load(tmp_path / "c.yaml") == experiment and isinstance(experiment, Experiment)
    assert experiment.data.named == f"{a} (weight 2), {b}" and experiment.data.sources[0].split == "test"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("[]", r"data\.source: expected a name, or a list of names or of {source: NAME, weight: 2\.0}, got \[\]"),
        ("3", r"data\.source: expected a name, .* got 3"),
        ("{source: a.jsonl, weight: 2}", r"data\.source: expected a name, .* got {'source'"),
        ("[a.jsonl, {source: b.jsonl, wieght: 2}]", r"data\.source: entry 2 of 2: unknown key wieght: did you mean weight\?"),
        ("[a.jsonl, {source: b.jsonl, weight: 0}]", r"entry 2 of 2: weight = 0: expected"),
        ("[a.jsonl, {source: b.jsonl, weight: 1e9}]", r"entry 2 of 2: weight = '1e9': expected less than or equal to 1000"),
        ("[a.jsonl, {weight: 2}]", r"entry 2 of 2: source is missing"),
        ("[3]", r"entry 1 of 1: source = 3: expected a valid string"),
    ],
)
def test_faults_in_a_list_of_sources(source, told):
    with pytest.raises(UserError, match=told):
        load(ROOT / "configs/demo.yaml", [f"data.source={source}"])


def test_one_of_two_is_missing(files, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"lost\.jsonl does not exist \(data\.source: a \.json"):
        load_data(section([files[0], str(tmp_path / "lost.jsonl")]), tokenizer, 0, 512)
    with pytest.raises(UserError, match=r"lost\.jsonl does not exist \(data\.eval_source: a \.json"):
        load_data(section(files[0], eval_source=str(tmp_path / "lost.jsonl")), tokenizer, 0, 512)
    with pytest.raises(UserError, match=r"b\.jsonl: weight = 0\.1 of 4 records is less than one an epoch"):
        load_data(section([files[0], {"source": files[1], "weight": 0.1}]), tokenizer, 0, 512)
    with pytest.raises(UserError, match="bytes and sha256 are of one file"):
        load(ROOT / "configs/demo.yaml", [f"data.source=[{files[0]}, {files[1]}]", "data.bytes=3"])


def test_a_file_of_a_folder_in_which_nothing_is_left(tmp_path, tokenizer):
    for name, answer in (("a", "yes"), ("b", " ")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": name, "answer": answer}))
    data = load_data(section(str(tmp_path)), tokenizer, 0, 512)
    assert (data.tokenized.records, data.tokenized.blank_answers, len(data.train.queries)) == (2, 1, 1)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(UserError, match="no query has a supervised token left: of 1 records 1 have a blank answer"):
        load_data(section(str(tmp_path)), tokenizer, 0, 512)


def test_notes_on_records_of_several_files_name_the_file(tmp_path):
    tokenizer, asked = make("r1"), {"role": "user", "content": "a"}
    said = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"}
    bad = [[asked], [asked, said, asked, said | {"content": " "}], [asked, said | {"content": "</s>"}],
           [asked, said | {"tool_calls": [{"name": "f"}]}]]  # fmt: skip
    for name, talks in (("a", [[asked, said]]), ("b", [[asked, said], *bad])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    b = f"{tmp_path}/b.jsonl"
    for source in (str(tmp_path), [f"{tmp_path}/a.jsonl", b]):
        told = [note for note in load_data(section(source), tokenizer, 0, 512).notes() if "first:" in note]
        assert [note.split("(first: ")[1].split(")")[0] for note in told] == [
            f"{b}, record 2, message 3", f"{b}, record 1", f"{b}, record 4", f"{b}, record 3", f"{b}, record 3, '</s>'"
        ]  # fmt: skip
    alone = load_data(section(b), tokenizer, 0, 512).notes()
    assert "1 empty turn (first: record 2, message 3): an empty answer is not trained on" in alone
