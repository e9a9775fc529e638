"""Templates whose prompt opens a thinking: what is trained on is what the model is to say behind that prompt, the thinking first."""

import pytest
from data.chat_templates import THINKING, make, records, rendered, talks

from moejax.data import chat
from moejax.data.pipeline import Dataset
from moejax.data.supervision import TalkOptions
from moejax.data.tokenize import prompts, tokenize
from moejax.errors import UserError

ARGUMENTS = {"v31": {"thinking": True}}


@pytest.mark.parametrize("where", ["key", "content", "nowhere"])
@pytest.mark.parametrize("name", THINKING)
def test_an_answer_stands_behind_its_prompt_with_its_thinking(name, where):
    """Against the prompts by `transformers`, each with its answer as the model is to write it, and the end of turn."""
    variables, (opens, closer) = ARGUMENTS.get(name, {}), THINKING[name]
    tokenizer, expected, given = make(name, **variables), [], []
    for messages in talks(5, system=name != "v31"):
        given.append([dict(message) for message in messages])
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                said, thought = message["content"], "" if where == "nowhere" else f"step {number}"
                if where == "key":
                    given[-1][number]["reasoning_content"] = thought
                elif where == "content":
                    given[-1][number]["content"] = f"{opens}{thought}{closer}{said}"
                prompt = rendered(tokenizer, given[-1][:number], True, **variables)
                assert prompt.endswith(opens)
                expected.append((prompt, f"{thought}{closer}{said}" + ("<|im_end|>" if "im_end" in tokenizer.chat_template else "</s>")))
    found = tokenize(records(given), tokenizer, "chat", 9999)
    assert len(found.queries) == len(expected) and len(found.thoughtless) == (len(expected) if where == "nowhere" else 0)
    assert not found.talks.left_out
    for query, (prompt, answer) in zip(found.queries, expected, strict=True):
        ids = tokenizer.encode(prompt + answer, add_special_tokens=False)
        first = len(tokenizer.encode(prompt, add_special_tokens=False))
        assert query.ids[: len(ids)].tolist() == ids and not tokenizer.decode(query.ids[len(ids) :]).strip()
        assert query.supervised.tolist() == [first <= at < len(ids) for at in range(len(query.ids))]
    asked = [prompts(records([messages[:-1]]), tokenizer, "chat")[0][0] for messages in given]
    assert all(prompt in [one for one, _ in expected] for prompt in asked)


def test_a_question_and_its_answer_alike():
    tokenizer = make("r1")
    record = {"instruction": "1 + 1?", "input": "", "output": "2"}
    found = tokenize([record, record | {"output": "<think>I add.</think>2"}], tokenizer, "chat", 99)
    texts = [tokenizer.decode(query.ids[query.supervised]) for query in found.queries]
    assert texts == ["\n</think>\n\n2</s>", "I add.\n</think>\n\n2</s>"] and found.thoughtless == [0]
    assert "1 answer has none (first: record 0): an empty one is trained on" in Dataset(None, None, found, "a.json").notes()[0]
    assert chat.end_of_turn(tokenizer) == "</s>"


def test_one_sequence_may_be_asked_for_and_what_is_not_known_is_refused():
    tokenizer = make("r1")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"}]
    whole = tokenize(records([messages]), tokenizer, "chat", 99, options=TalkOptions("whole")).queries[0]
    assert tokenizer.decode(whole.ids[whole.supervised]) == "\n\nb</s>" and "\u200b" not in tokenizer.decode(whole.ids)
    tokenizer.chat_template = tokenizer.chat_template.replace("<｜Assistant｜><think>", "<｜Bot｜><think>")
    with pytest.raises(UserError, match=r"a\.json, record 0: what the chat template writes to ask for an answer"):
        tokenize(records([messages]), tokenizer, "chat", 99, "a.json")
