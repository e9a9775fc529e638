"""Pairs of answers: the shapes in which people write them, what of them is trained on, and what is said of one that is none."""

import json

import numpy as np
import pytest
from data.chat_templates import SPLIT, TEMPLATES, make, records, talks
from pydantic import ValidationError
from support import ROOT, read_vectors, tiny_experiments

from moejax.config_data import DataConfig
from moejax.data.batch import PairBatch
from moejax.data.columns import Columns
from moejax.data.pipeline import load
from moejax.data.preferences import read_pair
from moejax.data.sources import load_sources
from moejax.data.supervision import TalkOptions
from moejax.data.tokenize import tokenize, tokenize_pairs
from moejax.data.tokenizer import load_tokenizer
from moejax.errors import UserError

USER, GOOD, BAD = ({"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("assistant", "c")))
SYSTEM = {"role": "system", "content": "s"}


@pytest.fixture(scope="module")
def tokenizer():
    made = load_tokenizer(str(ROOT / "assets/tiny-mixtral"))
    made.chat_template = str(read_vectors("preferences")["template"])
    return made


def read(tmp_path, records, name="a.json", **settings):
    path = tmp_path / name
    path.write_text(json.dumps(records))
    return load_sources(DataConfig(source=str(path), **settings), pairs=True)[0]


def data(tmp_path, records, tokenizer, **settings):
    (tmp_path / "a.json").write_text(json.dumps(records))
    return load(DataConfig(source=str(tmp_path / "a.json"), **settings), tokenizer, 0, 512, pairs=True)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"Prompt": "a", "CHOSEN": "b", "Rejected": "c", "score": 3},
        {"question": "a", "chosen": "b", "rejected": "c"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "a", "prompt_id": "7", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]},
        {"prompt": "a", "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": json.dumps([USER]), "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])},
        {"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "b"},
         "rejected": {"from": "gpt", "value": "c"}},
        {"messages": [USER], "chosen": GOOD, "rejected": BAD, "system": None, "tools": ""},
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
        {"input": {"messages": [USER], "tools": [], "parallel_tool_calls": True}, "preferred_output": [GOOD],
         "non_preferred_output": [BAD]},
    ],
)
def test_every_shape_is_the_same_pair(record, tmp_path):
    (found,) = read(tmp_path, [record]).records
    for side, answer in (("conversation", GOOD), ("rejected", BAD)):
        assert found[side] == ((USER, answer), None, (False, True))


def test_a_transcript_ends_its_prompt_where_the_answers_part(tmp_path):
    """hh-rlhf: paragraphs stay in their message, a colon within a line opens none, and other text is no transcript."""
    begin = "\n\nHuman: a\n\nb: Human: c\n\nAssistant: d\n\ne\n\nHuman: f\n\nAssistant:"
    (found,) = read(tmp_path, [{"chosen": f"{begin} g", "rejected": f"{begin} h\n"}]).records
    assert [message["content"] for message in found["conversation"].messages] == ["a\n\nb: Human: c", "d\n\ne", "f", "g"]
    assert found["rejected"].messages[-1] == BAD | {"content": "h"} and found["rejected"].trained == (False, False, False, True)
    alike = {"chosen": "\n\nHuman: a\r\n\r\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    for record in (
        {"prompt": "a"} | alike, {"prompt": "\n\nHuman: a\n\nAssistant:"} | alike,
        {"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": " b", "rejected": " c"},
    ):  # fmt: skip
        (found,) = read(tmp_path, [record]).records
        assert found["conversation"].messages == (USER, GOOD) and found["rejected"].messages == (USER, BAD)
    (found,) = read(tmp_path, [{"prompt": "Write a dialogue.", **alike}]).records  # an answer that is one
    assert found["rejected"].messages[1]["content"] == alike["rejected"]
    with pytest.raises(UserError, match=r"no prompt \(it has chosen, rejected\)"):
        read(tmp_path, [{"chosen": "Assistant: b", "rejected": "Assistant: c"}])


def test_a_prompt_is_repeated_by_a_message_that_holds_it_or_that_it_holds(tmp_path):
    for prompt in ("a", " a\n", "Human: a\n\nAssistant:", "b?", ""):
        talk = [SYSTEM, USER, GOOD, USER | {"content": "So, b?"}]
        (found,) = read(tmp_path, [{"prompt": prompt, "chosen": [*talk, GOOD], "rejected": [*talk, BAD]}]).records
        assert found["rejected"].messages == (*talk, BAD)


def test_context_system_and_named_columns(tmp_path):
    (found,) = read(tmp_path, [{"instruction": "a", "input": "x", "system": "s", "chosen": "b", "rejected": "c"}]).records
    assert found["conversation"].messages == (SYSTEM, USER | {"content": "a\nx"}, GOOD)
    assert found["conversation"].trained == found["rejected"].trained == (False, False, True)
    fields = {"instruction": "q", "chosen": "good", "rejected": "bad"}
    source = read(tmp_path, [{"q": "a", "good": "b", "bad": "c", "prompt": "z"}], fields=fields)
    assert next(source.records)["rejected"].messages == (USER, BAD)
    assert source.columns.told() == "instruction: 'q', chosen: 'good', rejected: 'bad' (data.fields)"


def test_the_prompt_is_what_both_begin_with_or_what_is_given_as_it(tmp_path):
    """A column of its own ends it, though answers go on alike; whole conversations end it where they differ."""
    more = [GOOD, USER]
    whole, apart = {"chosen": [USER, *more, GOOD], "rejected": [USER, *more, BAD]}, {"chosen": [*more, GOOD], "rejected": [*more, BAD]}
    (found,) = read(tmp_path, [whole]).records
    assert found["conversation"].trained == (False, False, False, True)
    (found,) = read(tmp_path, [{"prompt": [USER], **apart}]).records
    assert found["rejected"].trained == (False, True, True, True)
    (found,) = read(tmp_path, [{"prompt": "a", "system": "s", **apart}]).records
    assert found["rejected"].trained == (False, False, True, True, True)


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": None}, "record 1: no rejected answer under 'rejected' .it has prompt, chosen."),
        ({"prompt": "a", "rejected": "b"}, "record 1: no chosen answer under 'chosen'"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "record 1: 'rejected': expected a text, a message or a list of messages, got '3'"),
        ({"prompt": None, "chosen": "b", "rejected": "c"}, "record 1: no prompt .*names the prompt's column"),
        ({"chosen": [USER, GOOD], "rejected": [USER | {"content": "z"}, BAD]}, "record 1: chosen and rejected differ first at message 0, "
         "in chosen of the role 'user': a preference is between two answers to the same prompt"),
        ({"prompt": "z", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "record 1: 'chosen' is a conversation that asks something else "
         "than the record's prompt: expected an answer alone"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [USER | {"content": "z"}, BAD]}, "record 1: 'rejected' is a conv"),
        ({"prompt": "a", "chosen": [{"role": "x", "content": "b"}], "rejected": [BAD]}, "record 1, chosen, message 0: the role 'x' is unk"),
        ({"prompt": "a", "chosen": "b", "rejected": "\ud800"}, "record 1, rejected, message 1 holds half of a surrogate pair"),
    ],
)  # fmt: skip
def test_a_pair_that_is_none_is_named(record, told, tmp_path):
    with pytest.raises(UserError, match=told):
        read(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "c"}, record])


def test_a_file_without_pairs(tmp_path):
    with pytest.raises(UserError, match=r"record 0: .*pairs of answers, and no column 'rejected' is there: it has prompt"):
        read(tmp_path, [{"prompt": "a", "chosen": "b"}])
    with pytest.raises(UserError, match=r"no column 'good' is there: it has prompt, chosen, rejected"):
        read(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "c"}], fields={"chosen": "good"})


def test_tokens_are_trls(tokenizer, tmp_path):
    """Prompt and completions of conversations, apart and whole, as TRL's DPOTrainer tokenizes them."""
    vectors = read_vectors("preferences")
    found = data(tmp_path, json.loads(str(vectors["records"])), tokenizer, max_length=100)
    for number, ids in enumerate(json.loads(str(vectors["mixtral/ids"]))):
        for side, query in zip(("chosen_ids", "rejected_ids"), found.train.queries[2 * number :], strict=False):
            prompt = len(ids["prompt_ids"])
            assert query.ids.tolist() == ids["prompt_ids"] + ids[side]
            assert query.supervised.tolist() == [False] * prompt + [True] * len(ids[side])


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_side_is_what_supervised_training_makes_of_it(name):
    """For templates of every shape: tokens and mask of training on the last answer of each side's conversation."""
    tokenizer = make(name)
    chosen = talks(8, system=name != "gemma")
    rejected = [[*talk[:-1], {"role": "assistant", "content": f"{number} is another answer"}] for number, talk in enumerate(chosen)]
    columns = Columns(chosen="chosen", rejected="rejected")
    pairs = [read_pair({"chosen": a, "rejected": b}, columns, "x") for a, b in zip(chosen, rejected, strict=True)]
    found = tokenize_pairs([{"conversation": pair.chosen, "rejected": pair.rejected} for pair in pairs], tokenizer, "chat", 9999)
    assert len(found.queries) == 16 and found.dropped == found.talks.split == 0
    for side, conversations in enumerate((chosen, rejected)):
        alone = tokenize(records(conversations), tokenizer, "chat", 9999, options=TalkOptions(last_turn=True))
        for ours, supervised in zip(found.queries[side::2], alone.queries, strict=True):
            assert ours.ids.tolist() == supervised.ids.tolist() and ours.supervised.tolist() == supervised.supervised.tolist()


@pytest.mark.parametrize("name", SPLIT)
def test_a_side_of_several_answers_that_a_template_splits_is_refused(name):
    user, answers = {"role": "user", "content": "a"}, [{"role": "assistant", "content": text, "reasoning_content": "hm"} for text in "bcd"]
    record = {"prompt": [user], "chosen": [answers[0], user, answers[1]], "rejected": [answers[2], user, answers[1]]}
    pair = read_pair(record, Columns(instruction="prompt", chosen="chosen", rejected="rejected"), "x")
    made = [{"conversation": pair.chosen, "rejected": pair.rejected}]
    with pytest.raises(UserError, match=r"x, record 0, chosen: .*a side of a preference is one query: set data.turns to whole or last"):
        tokenize_pairs(made, make(name), "chat", 9999, "x")
    last = tokenize_pairs(made, make(name), "chat", 9999, "x", options=TalkOptions("last"))
    assert last.pairs.count == 0 and len(last.queries) == 2


def test_what_says_nothing_is_counted_with_its_first_record(tokenizer, tmp_path):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    records = [
        pair, pair | {"rejected": "b"}, pair | {"chosen": " "}, pair | {"prompt": "long " * 40}, pair | {"chosen": "b" * 60}, pair,
        pair | {"chosen": "d" * 60, "rejected": "d" * 59},
    ]  # fmt: skip
    found = data(tmp_path, records, tokenizer, max_length=32, row_tokens=64)
    counts = found.statistics()
    assert (counts["records"], counts["pairs"], counts["queries"], counts["dropped"], counts["cut"]) == (7, 3, 6, 4, 1)
    assert (counts["  equal sides"], counts["  an empty side"], counts["  a side cut off"], counts["duplicate"]) == (2, 1, 1, 1)
    notes = "\n".join(found.notes())
    assert "2 pairs have equal sides (first: record 1): dropped" in notes
    assert "1 pair has a side without an answer (first: record 2)" in notes
    assert "1 pair has a side cut off at data.max_length (first: record 3)" in notes
    assert max(len(query.ids) for query in found.train.queries) == 32
    dropped = data(tmp_path, records, tokenizer, max_length=32, row_tokens=64, too_long="drop").statistics()
    assert (dropped["  too long"], dropped["pairs"], dropped["cut"]) == (3, 2, 0)
    with pytest.raises(UserError, match="no pair is left to train on: of 1 records 1 have equal sides"):
        data(tmp_path, records[1:2], tokenizer, max_length=32)


@pytest.mark.parametrize(("batching", "more"), [("pack", {}), ("pad_longest", {"batch_rows": 4}), ("fixed", {"batch_rows": 2})])
def test_both_sides_lie_in_one_micro_batch(batching, more, tokenizer, tmp_path):
    """Of every pair of every epoch, in the order of `sides`; supervised are the answers' tokens."""
    records = [{"prompt": f"number {n}", "chosen": f"yes {n}", "rejected": f"no {n} " * (n % 4 + 1)} for n in range(23)]
    settings = {"max_length": 60, "row_tokens": 128, "batch_rows": 2, "batching": batching} | more
    found = data(tmp_path, records, tokenizer, **settings)
    for epoch in (0, 1):
        seen = []
        for batch in found.train.iterate(epoch):
            assert isinstance(batch, PairBatch)
            for pair in range(batch.sides.max() // 2):
                texts = []
                for side in (2 * pair + 1, 2 * pair + 2):
                    there = batch.sides == side
                    assert len(set(zip(*np.nonzero(there)[:1], batch.segment_ids[there], strict=True))) == 1
                    on = there & (batch.loss_mask > 0)
                    texts.append(tokenizer.decode(batch.targets[on]))
                assert texts[0].startswith("yes ") and texts[1].startswith(f"no {texts[0][4:-4]}") and texts[1].endswith("</s>")
                seen.append(texts[0])
        assert sorted(seen) == sorted(f"yes {n}</s>" for n in range(23))


def test_a_weight_counts_pairs(tokenizer, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.json").write_text(json.dumps([{"prompt": "a", "chosen": f"{name}{n}", "rejected": "c"} for n in range(8)]))
    source = [str(tmp_path / "a.json"), {"source": str(tmp_path / "b.json"), "weight": 0.5}]
    found = load(DataConfig(source=source, max_length=64), tokenizer, 0, 512, pairs=True)
    assert [sum(b.sides.max() // 2 for b in found.train.iterate(epoch)) for epoch in (0, 1)] == [12, 12]


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"adapter": None, "quantization": {"format": "none"}}, "preference needs an adapter: the reference is the frozen base without it"),
        ({"data": {"row_tokens": 100}}, "data.row_tokens = 100: both sides of a pair lie in one row, expected at least twice data.max_len"),
        ({"data": {"batching": "pad_longest", "batch_rows": 3}}, "data.batch_rows = 3: the sides of a pair are two rows"),
        ({"data": {"template": "text"}}, "preference trains on answers, and data.template = text knows none"),
        ({"data": {"source": None, "batching": "fixed"}}, "preference needs pairs of answers: give data.source"),
        ({"training": {"label_smoothing": 0.1}}, "training.label_smoothing is of cross-entropy"),
        ({"data": {"fields": {"output": "answer"}}}, "data.fields.output: preference reads the answers of a pair"),
        ({"preference": {"loss": "ipo", "label_smoothing": 0.1}}, "is of the losses sigmoid and robust: ipo has none"),
    ],
)
def test_what_a_config_of_preferences_may_not_say(sections, told, tmp_path):
    make = tiny_experiments(tmp_path)
    usual = {"preference": {}, "data": {"row_tokens": 128} | sections.pop("data", {})}
    make(**{"preference": {}, "data": {"row_tokens": 128}})
    with pytest.raises(ValidationError, match=told):
        make(**usual | sections)
