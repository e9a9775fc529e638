"""The shapes in which people write conversations, and what is said of one that is none."""

import json

import pytest

from moejax.config_data import DataConfig
from moejax.data.conversation import read
from moejax.data.sources import load_records
from moejax.errors import UserError

TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": TALK},
        {"messages": json.dumps(TALK)},
        {"messages": json.dumps(TALK, indent=1)},
        {"messages": TALK, "system": None, "system_prompt": ""},
        {"messages": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]},
                      {"role": "assistant", "content": [{"type": None, "text": "b"}]}]},
        {"messages": [m | {"name": None, "tool_calls": None} for m in TALK], "prompt": "a", "prompt_id": "7"},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"conversation": TALK},
        {"prompt": "a", "completion": "b"},
        {"prompt": TALK[:1], "completion": TALK[1:]},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": TALK, "rejected": [*TALK[:1], {"role": "assistant", "content": "c"}]},
        {"prompt": TALK[:1], "chosen": TALK[1:], "rejected": TALK[1:]},
        {"chosen": TALK, "rejected": TALK},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, TALK[1]]},
        {"conversation": [{"input": "a", "output": "b"}]},
        {"conversation": [{"role": "prompter", "text": "a"}, {"role": "assistant", "text": "b"}]},
        {"conversations": [{"from": "user", "value": "a", "text": None}, {"from": "bing", "value": "b", "text": None}]},
    ],
)
def test_every_shape_is_the_same_conversation(record):
    assert read(record) == (tuple(TALK), None, (True, True))


def test_what_is_no_conversation():
    for record in ({"instruction": "a", "output": "b"}, {"messages": "a"}, {"prompt": "a"}, {"completion": "b"}, {"text": "a"}):
        assert read(record) is None


def test_system_thinking_tools_and_weights():
    found = read(
        {
            "system": "s",
            "tools": '[{"name": "add", "description": null, "parameters": {}}]',
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "b", "weight": 0},
            ],
        }
    )
    assert [m["role"] for m in found.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert found.messages[2]["tool_calls"] == [CALL] and found.trained == (True, True, True, True, False)
    assert found.tools == ({"type": "function", "function": {"name": "add", "parameters": {}}},)
    for thinking in ("reasoning_content", "thinking", "reasoning"):
        for arguments in ('{"x": 1}', {"x": 1, "y": None}):
            call = {"function": {"name": "add", "arguments": arguments}, "id": None}
            message = {"role": "assistant", "content": None, thinking: "hm", "tool_calls": [call], "train": False}
            found = read({"messages": [TALK[0], message]})
            assert found.messages[1] == {
                "role": "assistant", "reasoning_content": "hm", "thinking": "hm", "tool_calls": [CALL]
            }  # fmt: skip
            assert found.trained == (True, False)


@pytest.mark.parametrize(
    "record", [{"system_prompt": "s"}, {"system": None, "system_prompt": "s"}, {"system": ["s"], "system_prompt": None}]
)
def test_a_system_prompt_alongside_nulls(record):
    assert read({"messages": TALK} | record).messages[0] == {"role": "system", "content": "s"}
    with pytest.raises(UserError, match="the record: 'system': expected a text, got an object"):
        read({"messages": TALK, "system": {"content": "s"}})


def test_one_of_two_system_prompts_would_be_lost():
    told = {"role": "system", "content": " s\n"}
    assert read({"messages": [told, *TALK], "system": "s"}).messages == (told, *TALK)
    with pytest.raises(UserError, match=r"record 3: its 'system_prompt' \('other'\) is another than what the system says in 'messages'"):
        read({"messages": [told, *TALK], "system_prompt": "other"}, "a.json, record 3")


@pytest.mark.parametrize("thought", ["hm", [{"type": "text", "text": "hm"}]])
def test_a_part_of_an_answer_may_be_its_thinking(thought):
    parts = [{"type": "thinking", "thinking": thought, "text": None}, {"type": "text", "text": "b", "thinking": None}]
    found = read({"messages": [TALK[0], {"role": "assistant", "content": parts}]})
    assert found == read({"messages": [TALK[0], TALK[1] | {"thinking": "hm"}]}) and found.messages[1]["content"] == "b"


def test_openais_older_files():
    """`functions` next to the messages, function_call in one, the role function for its result; the role developer."""
    messages = [
        {"role": "developer", "content": "s"}, {"role": "user", "content": "a", "name": "Ann"},
        {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"x": 1}'}, "weight": 0},
        {"role": "function", "name": "add", "content": "2"}, {"role": "assistant", "content": "b", "weight": 1},
    ]  # fmt: skip
    found = read({"messages": messages, "functions": [{"name": "add", "parameters": {}}], "parallel_tool_calls": False})
    assert found.tools == ({"type": "function", "function": {"name": "add", "parameters": {}}},)
    assert [m["role"] for m in found.messages] == ["developer", "user", "assistant", "tool", "assistant"]
    assert found.messages[1]["name"] == "Ann" and found.messages[2]["tool_calls"] == [CALL] and found.trained[2:] == (False, True, True)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({"role": "user", "utterance": "a"}, r"message 1: no 'content' \(or 'value', 'text'\) in it \(it has role, utterance\)"),
        ({"input": "a", "output": 3}, "message 2: expected a text, got a number"),
        ("a", "message 1: expected an object with role and content, got a text"),
        ({"content": "a"}, r"message 1: no 'role' \(or 'from'\) in it \(it has content\)"),
        ({"role": "narrator", "content": "a"}, "message 1: the role 'narrator' is unknown: expected system, .*assistant"),
        ({"role": "user", "content": 3}, "message 1: expected a text, got a number"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "message 1: a part of it is no text but 'image_url'"),
        ({"role": "assistant", "content": "", "tool_calls": [{"id": "7"}]}, "message 1: a tool call without a name"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{x"}]}, "message 1: the arguments of 'f': expected JSON"),
        ({"role": "assistant", "content": "a", "weight": 0.5}, "message 1: weight = 0.5: expected 0 or 1"),
    ],
)
def test_a_message_that_is_none_is_named(message, told):
    with pytest.raises(UserError, match=f"a.json, record 3, {told}"):
        read({"messages": [TALK[0], message]}, "a.json, record 3")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"tools": [{"name": "f", "description": "\ud800"}]}, "record 0: 'tools' holds half of a surrogate pair"),
        ({"messages": [TALK[0], TALK[1] | {"tool_calls": [{"name": "f", "arguments": {"\ud800": 1}}]}]}, "message 1 holds half of a"),
    ],
)
def test_half_a_character_in_tools_and_keys(more, told, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"messages": TALK} | more]))
    with pytest.raises(UserError, match=told):
        load_records(DataConfig(source=str(tmp_path / "a.json")))
