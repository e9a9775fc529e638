"""What is said of a chat template that is broken, marks nothing, or leaves an answer empty; and of a date and arguments for it."""

import pytest
from support import ROOT

from moejax.config import load
from moejax.data import chat
from moejax.data.chat_template import ChatTemplate
from moejax.data.conversation import read
from moejax.data.supervision import TalkOptions
from moejax.data.tokenize import tokenize
from moejax.data.tokenizer import load_tokenizer
from moejax.errors import UserError

ASK = "{% if add_generation_prompt %}<a>{% endif %}"
WRITES = "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}</s>{% endfor %}" + ASK
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def made(template, messages, **options):
    tokenizer = load_tokenizer(str(ROOT / "assets/tiny-mixtral"))
    tokenizer.chat_template = template
    return tokenizer, tokenize([{"conversation": read({"messages": messages})}], tokenizer, "chat", 999, options=TalkOptions(**options))


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for m in messages %}", "could not be rendered, its line 1 .TemplateSyntaxError"),
        (WRITES + "{% generation %}{% endgeneration %}", "record 0: its chat template has {% generation %}, and marks nothing"),
    ],
)
def test_a_template_is_refused_by_what_is_wrong_with_it(template, told):
    with pytest.raises(UserError, match=told):
        made(template, TALK)


def test_generation_is_found_however_it_is_written():
    import datetime

    for written, found in (("{%+ generation %}a{% endgeneration %}", True), ("{#{% generation %}#}a", False)):
        template = ChatTemplate(written, datetime.date(2026, 3, 9))
        assert template.generation == found and "\U0010f8f2" not in template.render([], False)


def test_an_answer_of_which_the_template_writes_nothing_is_not_trained_on():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    tokenizer, found = made(WRITES, [TALK[0], call, {"role": "tool", "content": "3"}, TALK[1]])
    (query,) = found.queries
    assert tokenizer.decode(query.ids[query.supervised]) == "b</s>" and found.talks.empty == [(0, 1)]


def test_a_split_that_was_asked_for_is_not_the_templates():
    found = made(WRITES, TALK * 2, turns="split")[1]
    assert found.talks.notes()[0].startswith("each answer of 1 conversation is a query of its own, by data.turns = split: ")


def test_arguments_that_are_the_conversations_own():
    tokenizer = load_tokenizer(str(ROOT / "assets/tiny-mixtral"))
    with pytest.raises(UserError, match=r"data\.template_args: messages is given by each conversation"):
        chat.settle(tokenizer, "chat", {"messages": []}, None)


def test_a_day_that_is_none():
    with pytest.raises(UserError, match=r"template_date = '2026-13-01': month must be in 1\.\.12: expected a day"):
        load(ROOT / "configs/my_chat.yaml", ["data.template_date=2026-13-01"])


def test_an_argument_that_the_template_does_not_read_is_refused():
    tokenizer = load_tokenizer(str(ROOT / "assets/tiny-mixtral"))
    tokenizer.chat_template = WRITES + "{% if enable_thinking %}x{% endif %}"
    chat.settle(tokenizer, "chat", {"enable_thinking": False}, None)
    with pytest.raises(UserError, match=r"data\.template_args: enable_thinkin does not stand in the tokenizer's chat template"):
        chat.settle(tokenizer, "chat", {"enable_thinkin": False}, None)


def test_letters_that_mark_what_is_generated_are_text_in_a_message():
    marked = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<a>{% generation %}{{ m.content }}</s>{% endgeneration %}"
        "{% else %}<u>{{ m.content }}</s>{% endif %}{% endfor %}"
    )
    asked = "x\U0010f8f2never\U0010f8f3y"
    tokenizer, found = made(marked, [{"role": "user", "content": asked}, TALK[1]])
    query = found.queries[0]
    assert tokenizer.decode(query.ids[query.supervised]) == "b</s>" and not found.talks.left_out
    assert tokenizer.decode(query.ids).startswith("<u>x<unk>never<unk>y</s>")  # tokens of their own, which this tokenizer does not have


def test_a_last_question_stays_in_mistrals_turns():
    tokenizer = load_tokenizer(str(ROOT / "assets/tiny-mixtral"))
    record = {"conversation": read({"messages": [*TALK, {"role": "user", "content": "c"}]})}
    query = tokenize([record], tokenizer, "mistral", 99).queries[0]
    assert tokenizer.decode(query.ids) == "[INST] a [/INST]b</s>[INST] c [/INST]"
    assert tokenizer.decode(query.ids[query.supervised]) == "b</s>"
