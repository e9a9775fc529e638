"""Which columns are trained on, by their names or by the config."""

import json

import pytest

from moejax.config_data import DataConfig
from moejax.config_sources import FieldNames
from moejax.data.columns import find
from moejax.data.sources import load_records, load_sources
from moejax.errors import UserError


def read(tmp_path, records, **settings):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records))
    return load_records(DataConfig(source=str(path), **settings))


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        ("instruction output", "instruction - output"),
        ("Instruction INPUT Output answer", "Instruction INPUT Output"),
        ("instruction input output text", "instruction input output"),
        ("instruction context response category", "instruction context response"),
        ("instruction answer", "instruction - answer"),
        ("prompt completion", "prompt - completion"),
        ("prompt response system", "prompt - response"),
        ("question answer", "question - answer"),
        ("question context answer", "question context answer"),
        ("system_prompt question response", "question - response"),
        ("query response original_question type", "query - response"),
        ("problem solution answer", "problem - solution"),
        ("input output", "input - output"),
    ],
)
def test_known_names(columns, parts, tmp_path):
    record = {name: f"the {name}" for name in columns.split()}
    asked, context, answer = parts.split()
    found = read(tmp_path, [record])[0]
    assert [found[part].removeprefix("the ") or "-" for part in ("instruction", "input", "output")] == [asked, context, answer]


@pytest.mark.parametrize("name", ["text", "Content", "document"])
def test_whole_texts(name, tmp_path):
    assert read(tmp_path, [{"id": 3, name: "a"}], template="text") == [{"text": "a"}]


@pytest.mark.parametrize(
    ("columns", "fields", "told"),
    [
        ("a b", {}, r"a\.json, record 0: no columns of questions .* by their names \(instruction/output, .*it has a, b; data\.fields="),
        ("text id", {}, "data.template=text trains on the whole of 'text'"),
        ("question answer prompt completion", {}, r"several columns could be meant \(prompt/completion, question/answer\): name those"),
        ("Question QUESTION answer", {}, "'Question' and 'QUESTION' could each be its 'question'"),
        ("question answer", {"instruction": "Question"}, "no text under 'Question'"),
        ("a b", {"instruction": "a"}, "names 'a' and not the column of output: it has a, b"),
        ("a response answer", {"instruction": "a"}, r"not the column of output: several could be \(response, answer\)"),
    ],
)
def test_what_is_not_known(columns, fields, told, tmp_path):
    with pytest.raises(UserError, match=told):
        read(tmp_path, [dict.fromkeys(columns.split(), "x")], fields=fields)


def test_one_name_is_enough_and_a_named_column_wins(tmp_path):
    record = {"a": "asked", "output": "said", "answer": "3", "question": "other"}
    assert read(tmp_path, [record], fields={"instruction": "a"})[0]["output"] == "said"
    named = read(tmp_path, [record], fields={"instruction": "question", "output": "answer"})[0]
    assert (named["instruction"], named["output"]) == ("other", "3")


def test_no_text_column_and_no_text_in_a_column(tmp_path):
    with pytest.raises(UserError, match=r"no column of whole texts is known by its name \(text, content, document\): it has a"):
        read(tmp_path, [{"a": "x"}], template="text")
    with pytest.raises(UserError, match=r"record 1: no text under 'answer', but an object; data\.fields="):
        read(tmp_path, [{"question": "a", "answer": "b"}, {"question": "a", "answer": {"text": ["b"]}}])


def test_a_context_may_be_missing_from_the_first_record(tmp_path):
    records = [{"instruction": "a", "output": "b"}, {"instruction": "a", "input": "c", "output": "b"}]
    assert [record["input"] for record in read(tmp_path, records)] == ["", "c"]


def test_mixed_schemas_are_reported_by_file_record_and_column(tmp_path):
    records = [{"question": "a", "answer": "b"}, {"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    assert [record["instruction"] for record in read(tmp_path, records)] == ["a", "a", "c"]
    for name, record in zip("bc", records, strict=False):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record))
    (source,) = load_sources(DataConfig(source=f"{tmp_path}/?.json*"))
    assert source.notes == (
        "mixed schemas: 3 of 5 records with other columns, instruction: 'prompt', output: 'completion' (by name; data.fields names "
        f"others), first {tmp_path}/a.json, record 1",
    )
    with pytest.raises(UserError, match=r"record 1: no text under 'answer' \(it has a, b\)"):
        read(tmp_path, [records[0], {"a": "x", "b": "y"}])


TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_records_of_another_kind_than_their_files_are_refused_by_number(tmp_path):
    pair, talk = {"question": "a", "answer": "b"}, {"messages": TALK}
    others = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, {"prompt": "a", "chosen": TALK[1:]}]
    assert len({str(record) for record in read(tmp_path, [talk, *others])}) == 1
    files = "put the two into files of their own, and give both: data.source='.ONE, OTHER.'"
    for records, told in (
        ([talk, talk, pair], r"record 2: a question and its answer \(instruction: 'question', output: 'answer'\), where record 0 is a "
         r"conversation \(messages: 'messages'\): " + files),
        ([pair, talk], r"record 1: a conversation \(messages: 'messages'\), where record 0 is a question and its answer"),
        ([talk, {"id": 3}], r"record 1: no conversation under 'messages' \(it has id\)"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=told):
            read(tmp_path, records)
    (tmp_path / "a.json").write_text(json.dumps([talk]))
    (tmp_path / "b.json").write_text(json.dumps([pair]))
    (source,) = load_sources(DataConfig(source=str(tmp_path)))
    assert source.count == 2 and "mixed schemas: 1 of 2 records with other columns, instruction: 'question'" in source.notes[0]


def test_messages_that_stand_for_records_are_known(tmp_path):
    with pytest.raises(UserError, match=r"it has role, content; .* these are the messages of one conversation: write \[\{\"messages\""):
        read(tmp_path, TALK)
    with pytest.raises(UserError, match=r"record 0: expected an object, got a list: of a conversation's messages, write \{\"messages\""):
        read(tmp_path, [TALK])


def test_a_conversation_in_a_column_of_another_name(tmp_path):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    by_name, named = read(tmp_path, [{"messages": talk}]), read(tmp_path, [{"chat": talk}], fields={"messages": "chat"})
    assert by_name == named and len(by_name[0]["conversation"].messages) == 2
    with pytest.raises(UserError, match="record 1: no list of messages under 'chat', but a text"):
        read(tmp_path, [{"chat": talk}, {"chat": "a"}], fields={"messages": "chat"})
    both = {"messages": talk, "instruction": "a", "output": "b"}
    assert read(tmp_path, [both])[0]["output"] == "b"


def test_what_belongs_to_a_conversation_is_read_with_it():
    record = {"prompt": "q", "chosen": "good", "rejected": "bad", "tools": None}
    assert find("a.jsonl", record, record, FieldNames(), None).others == ("rejected",)


def test_a_tables_nulls_are_no_schema(tmp_path):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    records = [{"messages": talk, "instruction": None, "output": None}, {"messages": None, "instruction": "a", "output": "b"}]
    for several in (records, records[::-1]):
        with pytest.raises(UserError, match=r"record 1: a .* where record 0 is a "):
            read(tmp_path, several)
    records[1] |= {"conversations": talk, "instruction": None, "output": None}
    assert len(read(tmp_path, records)) == 2
    nothing = dict.fromkeys(records[0])
    with pytest.raises(UserError, match="record 1: no list of messages under 'messages', but null"):
        read(tmp_path, [records[0], nothing])
    with pytest.raises(UserError, match="record 0: no list of messages under 'messages', but null"):
        read(tmp_path, [{"messages": None}, {"messages": talk}])
    with pytest.raises(UserError, match="record 0: no list of messages under 'messages', but an object"):
        read(tmp_path, [{"messages": talk[0]}])


def test_conversations_are_known_in_any_case_and_a_column_without_a_name_is_seen(tmp_path):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    plain = read(tmp_path, [{"messages": talk}])
    assert read(tmp_path, [{"Messages": talk}]) == plain
    for record in ({"Prompt": "a", "Chosen": talk, "Rejected": "x"}, {"PROMPT": talk[:1], "Completion": talk[1:]},
                   {"Conversations": [{"from": "Human", "value": "a"}, {"from": "GPT", "value": "b"}]}):  # fmt: skip
        assert read(tmp_path, [record]) == plain
    assert read(tmp_path, [{"Messages": talk, "System": "s"}])[0]["conversation"].messages[0]["content"] == "s"
    assert find("a.jsonl", {"Prompt": "q", "Chosen": "x", "Tools": None}, (), FieldNames(), None).others == ()
    record = {"": "0", "question": "a", "answer": "b"}
    assert find("a.csv", record, record, FieldNames(), None).told().endswith("not read: ''")
