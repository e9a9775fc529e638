"""From records to batches: masks, packing, padding, order, and what is refused."""

import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from support import ROOT, SHARED

from moejax.config_data import DataConfig
from moejax.data.batching import Batches, assemble, pack, stack
from moejax.data.pipeline import load
from moejax.data.sources import load_records
from moejax.data.templates import render
from moejax.data.tokenize import Query, tokenize
from moejax.data.tokenizer import check_vocabulary, load_tokenizer
from moejax.errors import UserError

RECORD = {"instruction": "Tom has 3 apples.", "input": "", "output": "The answer is 3.", "answer": "3"}
SAMPLES = ("math_1000_standin.json", "commonsense_1000_rebuilt.json")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(ROOT / "assets/tiny-mixtral"))


def section(**changes):
    return DataConfig(**({"source": "x.json", "row_tokens": 64, "max_length": 64} | changes))


def queries(count=50, seed=0):
    rng = np.random.default_rng(seed)
    return [Query.after(2, rng.integers(1, 99, rng.integers(4, 60)).astype(np.int32)) for _ in range(count)]


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


class TestSources:
    def write(self, tmp_path, name, text):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    def test_json_and_jsonl_are_the_same(self, tmp_path):
        both = [
            load_records(section(source=self.write(tmp_path, "a.json", json.dumps([RECORD, RECORD])))),
            load_records(section(source=self.write(tmp_path, "a.jsonl", f"{json.dumps(RECORD)}\n\n{json.dumps(RECORD)}\n"))),
        ]
        assert both[0] == both[1] == [RECORD, RECORD]

    def test_other_columns(self, tmp_path):
        path = self.write(tmp_path, "a.json", json.dumps([{"question": "Q", "answer": "A"}]))
        fields = {"instruction": "question", "output": "answer"}
        record = load_records(section(source=path, fields=fields))[0]
        assert (record["instruction"], record["output"]) == ("Q", "A")

    def test_declared_identity(self, tmp_path):
        text = json.dumps([RECORD])
        path = self.write(tmp_path, "a.json", text)
        digest = __import__("hashlib").sha256(text.encode()).hexdigest()
        assert load_records(section(source=path, records=1, bytes=len(text), sha256=digest))
        for change, message in (
            ({"records": 2}, "holds 1 records, data.records declares 2"),
            ({"bytes": 5}, "data.bytes declares 5"),
            ({"sha256": "0" * 64}, "data.sha256 declares 000"),
        ):
            with pytest.raises(UserError, match=message):
                load_records(section(source=path, **change))

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("a.json", "", "is empty"),
            ("a.json", "[]", "holds no records"),
            ("a.json", '[\n{"instruction": "a",}]', "line 2: broken JSON"),
            ("a.jsonl", '{"instruction": "a", "output": "b"}\n{oops\n', "line 2: broken JSON"),
            ("a.json", '{"a": 1}', "expected a JSON list"),
            ("a.json", '[{"instruction": "a", "output": "b"}, {"instruction": "a"}]', "record 1: no text under 'output'"),
            ("a.json", '[{"instruction": "a"}]', "data.fields='{instruction: QUESTIONS, output: ANSWERS}'"),
            ("a.json", '[{"messages": [{"role": "narrator", "content": "a"}]}]', "record 0, message 0: the role 'narrator' is unknown"),
            ("a.json", "[3]", "record 0: expected an object"),
        ],
    )
    def test_faults(self, name, text, message, tmp_path):
        with pytest.raises(UserError, match=message):
            load_records(section(source=self.write(tmp_path, name, text)))

    def test_url(self, tmp_path, monkeypatch):
        """A file from a web server on this machine, checked as a local one is."""
        (tmp_path / "served").mkdir()
        self.write(tmp_path / "served", "a.json", json.dumps([RECORD]))
        monkeypatch.setattr("datasets.config.DOWNLOADED_DATASETS_PATH", str(tmp_path / "cache"))
        handler = partial(QuietHandler, directory=str(tmp_path / "served"))
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            url = f"http://127.0.0.1:{server.server_port}"
            assert load_records(section(source=f"{url}/a.json", records=1)) == [RECORD]
            with pytest.raises(UserError, match=r"a\.json has 96 bytes, data\.bytes declares 5"):
                load_records(section(source=f"{url}/a.json", bytes=5))
            with pytest.raises(UserError, match="the download failed"):
                load_records(section(source=f"{url}/b.json"))
            server.shutdown()

    def test_missing_file_and_unknown_data_set(self, tmp_path, monkeypatch):
        with pytest.raises(UserError, match="does not exist"):
            load_records(section(source=str(tmp_path / "none.json")))
        monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
        with pytest.raises(UserError, match="`datasets` could not load it"):
            load_records(section(source=str(tmp_path / "nothing-here")))


class TestTemplates:
    def test_mistral_is_the_studys(self):
        assert render("mistral", RECORD, None) == ("[INST] Tom has 3 apples. [/INST]", "The answer is 3.")
        assert render("mistral", RECORD | {"input": "More."}, None)[0] == "[INST] Tom has 3 apples.\nMore. [/INST]"

    def test_alpaca(self):
        prompt, answer = render("alpaca", RECORD | {"input": "ctx"}, None)
        assert prompt.endswith("### Instruction:\nTom has 3 apples.\n\n### Input:\nctx\n\n### Response:\n")
        assert "### Input" not in render("alpaca", RECORD, None)[0] and answer == RECORD["output"]

    def test_chat(self, tokenizer):
        with pytest.raises(UserError, match="no chat template"):
            render("chat", RECORD, tokenizer)

        written = (
            "<user>{{ messages[0]['content'] }}{% if messages[1:] or add_generation_prompt %}<bot>{% endif %}"
            "{% for m in messages[1:] %}{{ m['content'] }}<end>{% endfor %}"
        )
        tokenizer = load_tokenizer(str(ROOT / "assets/tiny-mixtral"))
        tokenizer.chat_template = written
        assert render("chat", RECORD, tokenizer) == ("<user>Tom has 3 apples.<bot>", "The answer is 3.<end>")


class TestTokenizing:
    def test_the_mask_begins_with_the_answer_and_ends_with_the_end(self, tokenizer):
        query = tokenize([RECORD], tokenizer, "mistral", 64).queries[0]
        batch = assemble([[query]], 1, 64)
        supervised = batch.targets[0][batch.loss_mask[0] == 1]
        answer = tokenizer.encode(RECORD["output"], add_special_tokens=False)
        assert supervised.tolist() == [*answer, tokenizer.eos_token_id]
        assert tokenizer.decode(query.ids[~query.supervised]) == "[INST] Tom has 3 apples. [/INST]"

    def test_cut_and_dropped_are_counted(self, tokenizer):
        full = len(tokenize([RECORD], tokenizer, "mistral", 64).queries[0].ids)
        prompt = int((~tokenize([RECORD], tokenizer, "mistral", 64).queries[0].supervised).sum())
        cut = tokenize([RECORD] * 3, tokenizer, "mistral", full - 1)
        assert (cut.cut, cut.dropped, len(cut.queries)) == (3, 0, 3)
        with pytest.raises(UserError, match="no query has a supervised token left"):
            tokenize([RECORD], tokenizer, "mistral", prompt)
        mixed = tokenize([RECORD, RECORD | {"instruction": "Tom has 3 apples. " * 9}], tokenizer, "mistral", full)
        assert (mixed.dropped, len(mixed.queries)) == (1, 1)

    @pytest.mark.parametrize("length", [2, 3, 7, 20, 40, 41])
    def test_a_split_text_has_every_token_predicted_once(self, tokenizer, length):
        records = [{"text": "Tom has 3 apples and 4 pears. " * 4}, {"text": "Mia."}]
        whole = tokenize(records, tokenizer, "text", 999).queries
        made = tokenize(records, tokenizer, "text", length, too_long="split")
        parts = made.queries[: -1 if len(whole[1].ids) <= length else None]
        assert max(len(query.ids) for query in made.queries) <= length
        predicted = [id_ for query in parts for id_ in query.ids[1:]]
        assert predicted[: len(whole[0].ids) - 1] == whole[0].ids[1:].tolist()
        assert all(query.supervised.all() for query in made.queries)
        assert (made.split, made.cut, made.dropped) == (1 + (len(whole[1].ids) > length), 0, 0)

    def test_what_is_too_long_is_dropped_where_it_is_asked_for(self, tokenizer):
        full = len(tokenize([RECORD], tokenizer, "mistral", 64).queries[0].ids)
        records = [RECORD, RECORD | {"output": "The answer is 3." * 2}]
        made = tokenize(records, tokenizer, "mistral", full, too_long="drop")
        assert (made.too_long, made.dropped, made.cut, len(made.queries)) == (1, 1, 0, 1)
        with pytest.raises(UserError, match="1 are too long"):
            tokenize(records[1:], tokenizer, "mistral", full, too_long="drop")
        with pytest.raises(ValueError, match=r"too_long = split is for whole texts \(template = text\): with template = mistral"):
            section(too_long="split", template="mistral")

    def test_text_is_supervised_from_the_second_token(self, tokenizer):
        query = tokenize([{"text": "Tom has 3 apples."}], tokenizer, "text", 64).queries[0]
        batch = assemble([[query]], 1, 64)
        assert batch.loss_mask.sum() == len(query.ids) - 1

    def test_tokenizers_that_do_not_fit(self, tokenizer, tmp_path):
        with pytest.raises(UserError, match=r"largest id is 408, the model's vocabulary has 100 rows"):
            check_vocabulary(tokenizer, 100)
        with pytest.raises(UserError, match="sentencepiece"):
            load_tokenizer(str(tmp_path / "tokenizer.model"))
        with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
            load_tokenizer(str(tmp_path))
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "TikTokenTokenizer"}')  # Moonlight's
        with pytest.raises(UserError, match=r"no tokenizer\.json \(its tokenizer is a TikTokenTokenizer\): set tokenizer=PATH to one"):
            load_tokenizer(str(tmp_path))
        bare = load_tokenizer(str(ROOT / "assets/tiny-mixtral/tokenizer.json"))
        assert bare.eos_token == "</s>" and bare.pad_token_id == bare.eos_token_id


class TestBatching:
    def test_every_query_once_whole_and_in_bounds(self):
        data = queries()
        rows = pack([len(q.ids) for q in data], 64)
        assert sorted(i for row in rows for i in row) == list(range(len(data)))
        assert all(sum(len(data[i].ids) for i in row) <= 64 for row in rows)

    @pytest.mark.parametrize("batching", ["pack", "pad_longest", "pad_bucket", "fixed"])
    def test_batches_hold_every_token_once_in_rows_of_a_multiple_of_16(self, batching):
        data = queries()
        config = section(batching=batching, batch_rows=4, buckets=(60, 17, 34), row_tokens=60, max_length=60)
        batches = list(Batches(data, config, 0).iterate(0))
        assert sum(int((b.segment_ids > 0).sum()) for b in batches) == sum(len(q.ids) for q in data)
        lengths = {b.tokens.shape[1] for b in batches}
        assert all(b.tokens.shape[0] == 4 for b in batches) and max(lengths) <= config.longest_row == 64
        assert lengths <= {"pack": {64}, "fixed": {64}, "pad_bucket": {32, 48, 64}, "pad_longest": {16, 32, 48, 64}}[batching]
        if batching == "pack":
            assert all((b.segment_ids > 0).sum(axis=1).max() <= 60 for b in batches)
        if batching == "pad_longest":
            assert all(b.tokens.shape[1] - (b.segment_ids > 0).sum(axis=1).max() < 16 for b in batches)

    def test_order_depends_on_seed_and_epoch_only_and_can_be_entered_anywhere(self):
        def make(seed=0):
            return Batches(queries(), section(batch_rows=4), seed)

        first = [b.tokens for b in make().iterate(0)]
        again = make()
        list(again.iterate(3))
        for a, b in zip(first[2:], [b.tokens for b in again.iterate(0, start=2)], strict=True):
            np.testing.assert_array_equal(a, b)
        assert len(first) == again.batches_per_epoch(0)
        assert not np.array_equal(first[0], next(make().iterate(1)).tokens)
        assert not np.array_equal(first[0], next(make(seed=1).iterate(0)).tokens)

    def test_stacking_fills_up_with_empty_micro_batches(self):
        short, long = assemble([queries(1)], 1, 64), assemble([queries(1)], 1, 80)
        stacked = stack([short, long], 3)
        assert stacked.tokens.shape == (3, 1, 80) and stacked.loss_mask.dtype == np.float32
        assert stacked.loss_mask[2].sum() == 0 and stacked.segment_ids[2].max() == 0

    def test_synthetic_rows(self):
        data = load(section(source=None, batching="fixed", row_tokens=32, batch_rows=2), None, 0, 50)
        batch = next(data.train.iterate(0))
        assert batch.tokens.shape == (2, 32) and batch.tokens.max() < 50 and batch.loss_mask.sum() == 62

    def test_holdout(self, tmp_path, tokenizer):
        path = tmp_path / "a.json"
        path.write_text(json.dumps([RECORD] * 9 + [RECORD | {"output": " "}]))
        data = load(section(source=str(path), holdout=3), tokenizer, 0, 512)
        assert (len(data.train.queries), len(data.evaluation.queries), data.held_out_dropped) == (7, 2, 1)
        assert data.statistics()["records"] == 7 and data.table().rows[-1] == ("held out queries", "2 (1 dropped)")
        with pytest.raises(UserError, match="leaves nothing of 10"):
            load(section(source=str(path), holdout=10), tokenizer, 0, 512)


@pytest.mark.parametrize("sample", SAMPLES)
def test_packing_waste_on_real_text(sample):
    path, pieces = SHARED / "data" / sample, SHARED / "tokenizers" / "mistral_v1_tokenizer.json"
    if not path.exists() or not pieces.exists():
        pytest.skip(f"{sample} and Mixtral's tokenizer are not beside the project")
    config = section(source=str(path), row_tokens=2048, max_length=1024)
    data = load(config, load_tokenizer(str(pieces)), 0, 32000)
    assert data.train.waste() <= 0.03
