"""Conversations to tokens: what is trained on, made in ways that know nothing of each other, for templates of ten shapes."""

import datetime
import json

import numpy as np
import pytest
from data.chat_templates import DAY, SPLIT, TEMPLATES, make, records, rendered, talks
from support import ROOT

from moejax.config_data import DataConfig
from moejax.data import chat
from moejax.data.chat_template import ChatTemplate, TooMuch
from moejax.data.ends import Ends, ends_of
from moejax.data.pipeline import load
from moejax.data.supervision import TalkOptions, Talks
from moejax.data.tokenize import prompts, tokenize
from moejax.data.tokenizer import load_tokenizer
from moejax.errors import UserError

BUNDLED = ("tiny-mixtral", "tiny-qwen3-moe", "tiny-blackmamba")


def by_renderings(tokenizer, messages, end):
    """A character's mask: what a rendering up to an answer has more than its prompt, but for white space."""
    text = rendered(tokenizer, messages)
    mask = np.zeros(len(text), bool)
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt, upto = rendered(tokenizer, messages[:number], True), rendered(tokenizer, messages[: number + 1])
            assert text.startswith(prompt) and upto.startswith(prompt)
            answer = upto[len(prompt) :].rstrip()
            if end in answer:
                answer = answer[: answer.rindex(end) + len(end)]
            mask[len(prompt) : len(prompt) + len(answer)] = True
    return text, mask


ENDS = {
    "mistral": "</s>", "qwen3": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "harmony": "<|return|>", "deepseek": "</s>",
    "phi": "<|end|>", "command": "<|SAID|><|OVER|>", "generation": "<|im_end|>",
}  # fmt: skip


@pytest.mark.parametrize("base", BUNDLED)
@pytest.mark.parametrize("name", [name for name in ENDS if name not in SPLIT])
def test_one_sequence_as_transformers_renders_it_and_every_answer_in_the_loss(name, base):
    tokenizer = make(name, base)
    conversations = talks(system=name != "gemma")
    found = tokenize(records(conversations), tokenizer, "chat", 9999)
    assert len(found.queries) == len(conversations) and not found.talks.split and not found.talks.left_out
    assert found.talks.end == ENDS[name] and found.talks.answers == sum(len(c) // 2 for c in conversations)
    for query, messages in zip(found.queries, conversations, strict=True):
        text, mask = by_renderings(tokenizer, messages, ENDS[name])
        assert query.ids.tolist() == tokenizer.encode(text, add_special_tokens=False)
        # By offsets, which may lack a token's white space: a token with a character of the answer in it.
        offsets = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).offsets
        sure = [(at, mask[begin:end].any()) for at, (begin, end) in enumerate(offsets) if text[begin:end].strip()]
        assert [bool(query.supervised[at]) for at, _ in sure] == [bool(on) for _, on in sure]
        # By decoding: what is supervised, run by run, is what the renderings say.
        runs = np.flatnonzero(np.diff(np.r_[0, query.supervised.astype(int), 0])).reshape(-1, 2)
        spans = np.flatnonzero(np.diff(np.r_[0, mask.astype(int), 0])).reshape(-1, 2)
        said = [tokenizer.decode(query.ids[a:b], clean_up_tokenization_spaces=False).strip() for a, b in runs]
        assert said == [tokenizer.decode(tokenizer.encode(text[a:b], add_special_tokens=False)).strip() for a, b in spans]


def test_the_template_itself_says_what_the_assistants_part_is():
    tokenizer = make("generation")
    conversations = talks()
    for query, messages in zip(tokenize(records(conversations), tokenizer, "chat", 9999).queries, conversations, strict=True):
        theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert query.ids.tolist() == theirs["input_ids"] and query.supervised.tolist() == [bool(m) for m in theirs["assistant_masks"]]
    weighted = [[*messages[:-1], messages[-1] | {"weight": 0}] for messages in conversations if len(messages) > 3]
    for query, messages in zip(tokenize(records(weighted), tokenizer, "chat", 9999).queries, weighted, strict=True):
        assert not query.supervised[len(tokenizer.apply_chat_template(messages[:-1], return_dict=False)) :].any() and query.supervised.any()


@pytest.mark.parametrize("name", SPLIT)
def test_an_answer_that_is_another_at_use_is_a_query_of_its_own(name):
    tokenizer = make(name)
    conversations = talks(6, system=name == "qwen3")
    for messages in conversations:
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                message["thinking"] = f"step {number}"
    found = tokenize(records(conversations), tokenizer, "chat", 9999)
    expected = []
    for messages in conversations:
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                asked, upto = rendered(tokenizer, messages[:number], True), rendered(tokenizer, messages[: number + 1])
                expected.append([tokenizer.encode(text, add_special_tokens=False) for text in (asked, upto, upto.rstrip())])
    assert len(found.queries) == len(expected)
    for query, (asked, upto, said) in zip(found.queries, expected, strict=True):
        assert query.ids.tolist() in (upto, said)  # the whole of a conversation has the white space behind it
        assert query.supervised.tolist() == [len(asked) <= at < len(said) for at in range(len(query.ids))]
    several = sum(len(c) > 3 for c in conversations)
    assert found.talks.split == several and found.talks.extra_tokens > 0 and not found.talks.left_out
    told = found.talks.notes()[0]
    assert f"in {several} conversations" in told and f"{found.talks.extra_tokens:,} tokens more" in told
    last = tokenize(records(conversations), tokenizer, "chat", 9999, options=TalkOptions("last"))
    assert len(last.queries) == len(conversations) and not last.talks.split


def test_one_sequence_may_be_asked_for():
    """Qwen3's earlier answers without their thinking, as the whole conversation has them: that is counted."""
    tokenizer = make("qwen3")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning": "hm"}] * 2
    found = tokenize(records([messages]), tokenizer, "chat", 999, options=TalkOptions("whole"))
    assert found.queries[0].ids.tolist() == tokenizer.encode(rendered(tokenizer, messages), add_special_tokens=False)
    assert tokenizer.decode(found.queries[0].ids[found.queries[0].supervised]) == "b<|im_end|><think>\nhm\n</think>\n\nb<|im_end|>"
    split = tokenize(records([messages]), tokenizer, "chat", 999, options=TalkOptions("split"))
    assert len(split.queries) == 2 and tokenizer.decode(split.queries[0].ids).endswith("<think>\nhm\n</think>\n\nb<|im_end|>")


def test_template_args_and_the_day():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    query = tokenize(records([messages]), make("qwen3", enable_thinking=False), "chat", 99).queries[0]
    tokenizer = make("qwen3")
    assert tokenizer.decode(query.ids[query.supervised]) == "b<|im_end|>", "the empty thinking is of the prompt"
    query = tokenize(records([messages]), tokenizer, "chat", 99).queries[0]
    assert tokenizer.decode(query.ids[query.supervised]) == "<think>\n\n</think>\n\nb<|im_end|>"
    assert "Today: 09 Mar 2026" in make("llama3").decode(tokenize(records([messages]), make("llama3"), "chat", 99).queries[0].ids)
    chat.settle(tokenizer := make("llama3"), "chat", {}, None)
    assert datetime.date.today().strftime("%d %b %Y") in prompts(records([messages[:1]]), tokenizer, "chat")[0][0]


@pytest.mark.parametrize("name", [*ENDS, "plain"])
def test_prompts_at_use_are_those_of_training(name):
    tokenizer = make(name)
    for messages in talks(6, system=name != "gemma"):
        upto = max(n for n, m in enumerate(messages) if m["role"] == "assistant")
        query = tokenize(records([messages]), tokenizer, "chat", 9999).queries[-1]
        asked = prompts(records([messages[:upto]]), tokenizer, "chat")[1][0]
        assert query.ids[: len(asked)].tolist() == asked and not query.supervised[len(asked) - 1] and query.supervised[len(asked)]
        assert asked == tokenizer.encode(rendered(tokenizer, messages[:upto], True), add_special_tokens=False)


def test_an_end_that_is_no_token_is_followed_by_the_end_of_sequence():
    tokenizer = make("plain")
    found = tokenize(records([[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2]), tokenizer, "chat", 99)
    query = found.queries[0]
    assert query.ids[-1] == tokenizer.eos_token_id and query.supervised[-1] and found.end == "</s>"
    assert tokenizer.decode(query.ids) == "Human: a\n\nBot: b\n\nHuman: a\n\nBot: b</s>"
    assert tokenizer.decode(query.ids[query.supervised]) == " b b</s>"


def test_an_end_by_the_template_that_is_no_token_ends_a_turn_once():
    """Phi's on a tokenizer without its `<|end|>`: the text, and one end of sequence, in a conversation and in a question and its answer."""
    tokenizer = load_tokenizer(str(ROOT / "assets/tiny-mixtral"))
    tokenizer.chat_template = TEMPLATES["phi"][0]
    found = tokenize(records([[USER, BOT] * 2]), tokenizer, "chat", 99)
    (query,) = found.queries
    assert tokenizer.decode(query.ids) == ("<|user|>\na<|end|>\n<|assistant|>\nb<|end|>\n" * 2).rstrip() + "</s>"
    assert tokenizer.decode(query.ids[query.supervised]) == "b<|end|>b<|end|></s>"
    alone = tokenize([{"instruction": "a", "input": "", "output": "b"}], tokenizer, "chat", 99).queries[0]
    assert tokenizer.decode(alone.ids[alone.supervised]) == "b<|end|></s>"
    assert ends_of(tokenizer, "chat") == Ends((tokenizer.eos_token_id,), "<|end|>")


def test_tools():
    """Calls and results where the template has them; what it leaves out is counted, and named."""
    call = {"type": "function", "function": {"name": "sum_up", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"}, {"role": "assistant", "content": "It is 2."},
    ]  # fmt: skip
    tool = {"type": "function", "function": {"name": "sum_up", "description": "two numbers in one", "parameters": {"type": "object"}}}
    filled = {"type": "function", "function": {"name": "sum_up", "arguments": {"x": 1}}}
    plain = [m | ({"tool_calls": [filled]} if "tool_calls" in m else {}) for m in messages]
    for name in ("mistral", "qwen3", "harmony"):
        tokenizer = make(name)
        found = tokenize(records([messages], tools=[tool]), tokenizer, "chat", 999)
        last = rendered(tokenizer, plain, tools=[tool]).rstrip()
        assert tokenizer.decode(found.queries[-1].ids, clean_up_tokenization_spaces=False).rstrip() == last
        assert found.talks.answers == 2 and set(found.talks.left_out) == ({"tools"} if name == "harmony" else set())
    tokenizer = make("deepseek")
    found = tokenize(records([[*messages[:1], messages[1] | {"content": "I add."}, *messages[2:]]], tools=[tool]), tokenizer, "chat", 999)
    assert found.talks.left_out == {"tool calls": [0], "tools": [0]}
    assert "the chat template leaves out tool calls of 1 conversation (first: record 0)" in found.talks.notes()


@pytest.mark.parametrize(("content", "arguments"), [(None, {"x": 1}), ("", '{"x": 1}')])
def test_a_call_is_written_in_the_form_that_the_template_takes(content, arguments):
    """DeepSeek's: null for no content, arguments as text; however the file has them. (transformers 5.23 gives it neither, and fails.)"""
    tokenizer = make("text_calls")
    call = {"role": "assistant", "content": content, "tool_calls": [{"function": {"name": "add", "arguments": arguments}}]}
    query = tokenize(records([[USER, call, {"role": "tool", "content": "2"}, BOT]]), tokenizer, "chat", 99).queries[0]
    assert tokenizer.decode(query.ids) == '<user>a</s><call>add {"x": 1}</s><tool>2</s><bot>b</s>'


def test_an_answer_behind_a_prompt_that_the_whole_does_not_have():
    """Mistral's system prompt, which stands before the last question alone: each answer behind its own prompt."""
    tokenizer = make("last")
    messages = [{"role": "system", "content": "s"}, USER, BOT, USER | {"content": "c"}, BOT | {"content": " d"}]
    found = tokenize(records([messages]), tokenizer, "chat", 99)
    first, second = found.queries
    assert tokenizer.decode(first.ids) == "<s>[INST] s\n\na[/INST] b</s>"
    assert tokenizer.decode(second.ids) == "<s>[INST] a[/INST] b</s>[INST] s\n\nc[/INST] d</s>"
    for query, upto in ((first, 2), (second, 4)):
        prompt = tokenizer.encode(rendered(tokenizer, messages[:upto], True), add_special_tokens=False)
        assert query.ids[: len(prompt)].tolist() == prompt
        assert query.supervised.tolist() == [at >= len(prompt) for at in range(len(query.ids))]


def test_an_answer_behind_a_prompt_that_ends_otherwise_in_the_whole():
    """As in Hermes' tools: a line break where another turn follows, and none in the prompt."""
    tokenizer = load_tokenizer(str(ROOT / "assets/tiny-mixtral"))
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ '' if loop.last else '|' }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    first, second = tokenize(records([[USER | {"content": "1 + 1"}, BOT] * 2]), tokenizer, "chat", 99).queries
    assert tokenizer.decode(first.ids) == "<user>1 + 1</s><assistant>b</s>"
    assert tokenizer.decode(second.ids) == "<user>1 + 1|</s><assistant>b|</s><user>1 + 1</s><assistant>b</s>"
    assert tokenizer.decode(second.ids[second.supervised]) == tokenizer.decode(first.ids[first.supervised]) == "b</s>"


def test_thinking_calls_and_questions_that_a_template_has_no_word_for():
    """Counted where they are dropped, also of messages that are plain without them; what follows the last answer is in no query."""
    call = {"tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    found = tokenize(records([[USER, BOT | {"reasoning": "hm"}], [USER, BOT | call], [USER, BOT]]), make("gemma"), "chat", 99)
    assert found.talks.left_out == {"thinking": [0], "tool calls": [1]}
    found = tokenize(records([[USER, BOT, USER | {"content": "more?"}]]), make("r1"), "chat", 99)
    assert len(found.queries) == 1 and not found.talks.left_out


def test_what_a_user_wrote_of_control_tokens_is_text():
    tokenizer = make("qwen3")
    messages = [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\n<|im_end|>b"}]
    found = tokenize(records([messages]), tokenizer, "chat", 999)
    ids, vocabulary = found.queries[0].ids.tolist(), tokenizer.get_vocab()
    assert [ids.count(vocabulary[t]) for t in ("<|im_end|>", "<think>", "</think>")] == [2, 1, 1] and found.marked == 1
    assert tokenizer.decode(found.queries[0].ids[found.queries[0].supervised]).startswith("<think>\nhm\n</think>\n\n<|im_end|>b")


def test_weights_and_the_last_turn():
    tokenizer = make("llama3")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "one"},
                {"role": "user", "content": "b"}, {"role": "assistant", "content": "two", "train": False}]  # fmt: skip
    query = tokenize(records([messages]), tokenizer, "chat", 999).queries[0]
    assert tokenizer.decode(query.ids[query.supervised]) == "one<|eot_id|>"
    messages[-1].pop("train")
    query = tokenize(records([messages]), tokenizer, "chat", 999, options=TalkOptions(last_turn=True)).queries[0]
    assert tokenizer.decode(query.ids[query.supervised]) == "two<|eot_id|>"


@pytest.mark.parametrize("name", ["llama3", "gemma", "phi"])
def test_other_roles_may_be_trained_on(name):
    tokenizer = make(name)
    messages = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}] * 2
    found = tokenize(records([messages]), tokenizer, "chat", 999, options=TalkOptions(roles=("user", "assistant")))
    query, end = found.queries[0], ENDS[name]
    assert tokenizer.decode(query.ids[query.supervised]) == f"a b{end}c{end}a b{end}c{end}"
    with pytest.raises(UserError, match=r"record 0: .* data\.train_on\.roles has 'user'"):
        tokenize(records([messages]), make("harmony"), "chat", 999, options=TalkOptions(roles=("user", "assistant")))


def test_from_a_file_to_batches(tmp_path):
    """The template, and the day where the template asks for it, are settled by what is read; sources may be of both kinds."""
    path, other = tmp_path / "chat.jsonl", tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in talks(8)))
    other.write_text("".join(json.dumps(line) + "\n" for line in ({"instruction": "a", "output": "b"}, {"prompt": "a", "completion": "b"})))
    tokenizer = make("llama3")
    data = load(DataConfig(source=[str(path), str(other)]), tokenizer, 0, 512)
    assert (data.config.template, data.config.template_date) == ("chat", datetime.date.today().isoformat())
    assert data.statistics()["  conversations"] == 8 and len(data.train.queries) == 10
    asked, said = data.train.queries[-2:]
    assert asked.ids.tolist() == said.ids.tolist() and (asked.supervised == said.supervised).all()
    assert load(DataConfig(source=str(path), template_date=DAY), make("qwen3"), 0, 512).config.template_date == DAY
    path.write_text(json.dumps({"instruction": "a", "output": "b", "prompt": "a", "completion": "c"}) + "\n")
    data = load(DataConfig(source=str(path)), make("qwen3"), 0, 512)
    assert data.config.template == "mistral" and data.config.template_date is None and "  conversations" not in data.statistics()


def test_the_template_mistral():
    tokenizer = load_tokenizer(str(ROOT / "assets/tiny-mixtral"))
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]  # fmt: skip
    query = tokenize(records([messages]), tokenizer, "mistral", 99).queries[0]
    assert tokenizer.decode(query.ids) == "[INST] s\n\na [/INST]b</s>[INST] c [/INST]d</s>"
    assert tokenizer.decode(query.ids[query.supervised]) == "b</s>d</s>"
    alone = tokenize([{"instruction": "a", "input": "", "output": "b"}], tokenizer, "mistral", 99).queries[0]
    assert prompts(records([messages[:4]]), tokenizer, "mistral")[0] == ["[INST] s\n\na [/INST]b</s>[INST] c [/INST]"]
    asked = prompts(records([messages[:4]]), tokenizer, "mistral")[1][0]
    assert query.ids[: len(asked)].tolist() == asked and len(query.ids) == len(asked) + 2
    query = tokenize(records([messages[1:3]]), tokenizer, "mistral", 99).queries[0]
    assert all((a == b).all() for a, b in zip(query, alone, strict=True))


def test_the_template_alpaca():
    """The first turn as a question and its answer have it; later ones behind it, each answer with the end of sequence."""
    tokenizer = load_tokenizer(str(ROOT / "assets/tiny-mixtral"))
    turn = "### Instruction:\n{}\n\n### Response:\n{}</s>"
    alone = tokenize([{"instruction": "a", "input": "", "output": "b"}], tokenizer, "alpaca", 999).queries[0]
    for system in ("", "s"):
        messages = [{"role": "system", "content": system}, USER, BOT, USER | {"content": "c"}, BOT | {"content": "d"}]
        query = tokenize(records([messages]), tokenizer, "alpaca", 999).queries[0]
        head = system or tokenizer.decode(alone.ids).split("\n\n")[0]
        assert tokenizer.decode(query.ids) == f"{head}\n\n{turn.format('a', 'b')}\n\n{turn.format('c', 'd')}"
        assert tokenizer.decode(query.ids[query.supervised]) == "b</s>d</s>"
        assert prompts(records([messages[:4]]), tokenizer, "alpaca")[1][0] == query.ids[:-2].tolist()
    assert query.ids.tolist() != alone.ids.tolist() == tokenize(records([[USER, BOT]]), tokenizer, "alpaca", 999).queries[0].ids.tolist()


USER, BOT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("name", "template", "messages", "told"),
    [
        ("qwen3", "chat", [BOT, USER, BOT], "a.json, record 1: it begins with the assistant's turn"),
        ("gemma", "chat", [USER, USER, BOT], "a.json, record 1 could not be rendered.*must take turns.*roles are user, user, assistant"),
        ("gemma", "chat", [{"role": "system", "content": "s"}, USER, BOT], "record 1 could not be rendered.*no system role"),
        ("qwen3", "mistral", [USER, USER, BOT], "record 1, message 1: the role 'user', where data.template = mistral expects 'assistant'"),
        ("qwen3", "chat", [USER, BOT, BOT], r"record 1: what .*nb<.im_end.>.n<.im_start.>assistant.n' at its end"),
        ("qwen3", "alpaca", [BOT], "record 1, message 0: the role 'assistant', where data.template = alpaca expects 'user'"),
        ("qwen3", "text", [USER, BOT], "record 0: a conversation, and data.template = text has no form for its turns"),
    ],
)
def test_a_conversation_that_is_refused_is_named(name, template, messages, told):
    with pytest.raises(UserError, match=told):
        tokenize(records([[USER, BOT], messages]), make(name), template, 99, "a.json")


@pytest.mark.parametrize(
    "template",
    [
        "{% macro f(n) %}{{ f(n - 1) if n else '' }}{{ f(n - 1) if n else '' }}{% endmacro %}{{ f(60) }}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = x %}{% endfor %}",
        "{{ 'a' * 10**9 }}",
        "{{ [0] * 99999999 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '{:999999999d}'.format(1) }}",
        "{{ '%999999999d' | format(1) }}",
        "{{ 'a' | center(999999999) }}",
    ],
)
def test_a_template_that_does_not_end_or_outgrows_memory_is_stopped(template):
    with pytest.raises(TooMuch, match="stopped"):
        ChatTemplate(template, datetime.date(2026, 3, 9)).render([USER], False)


def test_numbers_in_what_people_say_are_no_widths():
    template = ChatTemplate("{% for m in messages %}{{ m.content.strip() + '%s' % m.content }}{% endfor %}", datetime.date(2026, 3, 9))
    assert template.render([{"role": "user", "content": "1234567890 * 2"}], False) == "1234567890 * 2" * 2


def test_templates_that_do_not_serve():
    tokenizer = load_tokenizer(str(ROOT / "assets/tiny-mixtral"))
    with pytest.raises(UserError, match=r"has no chat template: use data\.template = mistral, .* chatml"):
        tokenize(records([[USER, BOT]]), tokenizer, "chat", 99)
    with pytest.raises(UserError, match=r"has no token <\|im_start\|> and no <\|im_end\|>"):
        chat.settle(tokenizer, "chatml", {}, None)
    tokenizer.chat_template = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(UserError, match="TooMuch: it loops"):
        tokenize(records([[USER, BOT]]), tokenizer, "chat", 99, "a.json")
    tokenizer = make("qwen3")
    chat.settle(tokenizer, "chatml", {}, None)
    query = tokenize(records([[USER, BOT]]), tokenizer, "chatml", 99).queries[0]
    assert tokenizer.decode(query.ids).startswith("<|im_start|>user\na<|im_end|>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    with pytest.raises(UserError, match=r"a\.json, record 0: what the chat template writes to ask for an answer .*<bot>' at its end"):
        tokenize(records([[USER, BOT]]), tokenizer, "chat", 99, "a.json")


def test_keys_that_a_template_knows_reach_it():
    tokenizer = make("phi")
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m['content'] }}", "{{ m['name'] or '' }}{{ m['content'] }}")
    messages = [USER | {"name": "Ann ", "id": 7, "created": "x"}, BOT]
    assert tokenizer.decode(tokenize(records([messages]), tokenizer, "chat", 99).queries[0].ids).startswith("<|user|>\nAnn a<|end|>")


def test_what_is_dropped_is_counted():
    tokenizer = make("llama3")
    silent = BOT | {"content": " "}
    found = tokenize(records([[USER, BOT], [USER], [USER, silent], [USER, BOT, USER, BOT | {"content": "\u200b"}]]), tokenizer, "chat", 99)
    assert (len(found.queries), found.dropped, found.talks.unanswered, found.talks.empty) == (2, 2, [1, 2], [(2, 1), (3, 3)])
    told = found.talks.notes()
    assert told[0].startswith("2 empty turns (first: record 2, message 1)") and "2 conversations have no answer" in told[1]
    assert Talks(unanswered=[3], empty=[(3, 1)], left_out={"tools": [3]}).notes() == [
        "1 empty turn (first: record 3, message 1): an empty answer is not trained on",
        "1 conversation has no answer to train on: dropped (first: record 3)",
        "the chat template leaves out tools of 1 conversation (first: record 3)",
    ]
    asked_nothing = tokenize(records([[USER | {"content": "\u200b"}, BOT]]), tokenizer, "mistral", 99)
    assert asked_nothing.talks.empty == [(0, 0)] and len(asked_nothing.queries) == 1
    with pytest.raises(UserError, match="no query has a supervised token left: of 1 records 1 have no answer to train on"):
        tokenize(records([[USER]]), tokenizer, "chat", 99)
    cut = tokenize(records([[USER, BOT | {"content": "b " * 99}]]), tokenizer, "chat", 99)
    assert (cut.cut, len(cut.queries[0].ids)) == (1, 99)
