"""`data.template: chat`: prompt, answer and end are the template's, and generation ends where training did."""

import json
import shutil

import jax
import numpy as np
import pytest
from support import ROOT

from moejax.data import chat
from moejax.data.ends import Ends, ends_of
from moejax.data.pipeline import Dataset
from moejax.data.text_tokens import text_tokens
from moejax.data.tokenize import prompts, tokenize
from moejax.data.tokenizer import load_tokenizer
from moejax.errors import UserError
from moejax.evaluation.generate import before, generate, stream
from moejax.models.build import build
from moejax.models.config import PRESETS

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPACED = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %} [INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
RECORD = {"instruction": "Tom has 3 apples.", "input": "", "output": "The answer is 3."}


@pytest.fixture
def folder(tmp_path):
    """make(template or None, other files…) -> a folder with the bundled tokenizer."""

    def make(template=None, added=(), **files):
        shutil.copytree(ROOT / "assets/tiny-mixtral", tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
        if template is not None:
            settings["chat_template"] = template
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        content = json.loads((tmp_path / "tokenizer.json").read_text())
        for id_, name in enumerate(added, 409):
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            content["added_tokens"].append({"id": id_, "content": name, "special": name != "<|im_start|>", **flags})
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        for name, text in files.items():
            (tmp_path / name.replace("__", ".")).write_text(text)
        return tmp_path

    return make


def test_the_template_writes_the_answer_and_its_end(folder):
    """ChatML with tokens: the answer ends with <|im_end|>, supervised; nothing follows."""
    tokenizer = load_tokenizer(str(folder(CHATML, added=("<|im_start|>", "<|im_end|>"))))
    spoken = {"instruction": "Say <|im_end|> or <|im_start|>.", "input": "", "output": " </s><|im_end|> "}
    found = tokenize([RECORD, spoken], tokenizer, "chat", 99)
    query = found.queries[0]
    assert "'<|im_end|>', not with the tokenizer's end of sequence '</s>'" in Dataset(None, None, found, "a.json").notes()[-1]
    assert query.ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>") and found.end == "<|im_end|>"
    assert tokenizer.decode(query.ids[~query.supervised]) == "<|im_start|>user\nTom has 3 apples.<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(query.ids[query.supervised]) == "The answer is 3.<|im_end|>"
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": RECORD["instruction"]}, {"role": "assistant", "content": RECORD["output"]}], tokenize=False
    )
    assert query.ids.tolist() == tokenizer.encode(whole.rstrip(), add_special_tokens=False)
    spoken = found.queries[1]  # what a user wrote of the marks is text, and trimmed as the template trims it
    assert [sum(spoken.ids == i) for i in (409, 410, tokenizer.eos_token_id)] == [2, 2, 0] and found.marked == 1
    assert tokenizer.decode(spoken.ids[spoken.supervised]) == "</s><|im_end|><|im_end|>"
    assert prompts([RECORD], tokenizer, "chat")[1] == [query.ids[~query.supervised].tolist()]


def test_an_end_that_is_no_token(folder):
    """It is written, and the end of sequence, which generation can stop at, follows it."""
    tokenizer = load_tokenizer(str(folder(CHATML)))
    found = tokenize([RECORD, RECORD | {"output": "a <|im_end|> b"}], tokenizer, "chat", 199)
    query = found.queries[0]
    assert tokenizer.decode(query.ids[query.supervised]) == "The answer is 3.<|im_end|></s>"
    assert found.marked == 1, "the user's mark is the same text as the template's"
    told = Dataset(None, None, found, "a.json").notes()
    assert told[0].startswith("1 record holds")
    assert "'<|im_end|>', which is no token of this tokenizer: the end of sequence '</s>'" in told[1]
    assert ends_of(tokenizer, "chat") == Ends((tokenizer.eos_token_id,), "<|im_end|>")


def test_the_space_before_an_answer_is_the_templates(folder):
    tokenizer = load_tokenizer(str(folder(SPACED)))
    query = tokenize([RECORD], tokenizer, "chat", 99).queries[0]
    assert tokenizer.decode(query.ids) == "<s> [INST] Tom has 3 apples. [/INST] The answer is 3.</s>"
    assert (query.ids == tokenizer.eos_token_id).sum() == 1


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ raise_exception('a system message is needed') }}", "record 3 could not be rendered.*a system message is needed"),
        ("{% for m in messages %}{{ m['content'] }", r"record 3 could not be rendered, its line 1 \(TemplateSyntaxError"),
        ("{{ messages[5]['content'] }}", r"record 3 could not be rendered.*UndefinedError"),
        ("{{ messages[0]['content'] + 1 }}", r"record 3 could not be rendered.*TypeError"),
        ("{{ messages[0]['content'] }}{% if add_generation_prompt %}<bot>{% else %}a{% endif %}", r"record 3: .*'.*<bot>' at its end"),
        ([{"name": "rag", "template": "x"}], "record 3 could not be rendered"),
        ("{{ messages[0]['content'] }}:", "record 3 does not write this answer as it stands"),
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "record 3 does not write this answer as it stands"),
    ],
)
def test_a_template_that_refuses_is_one_message(template, told, folder):
    tokenizer = load_tokenizer(str(folder(template)))
    with pytest.raises(UserError, match=told) as caught:
        tokenize([RECORD], tokenizer, "chat", 99, "a.json", 3)
    assert str(folder()) in str(caught.value) and "a.json" in str(caught.value)
    assert tokenize([RECORD], tokenizer, "mistral", 99).queries, "whoever does not use it need not know"
    assert ends_of(tokenizer, "mistral").ids[0] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    "where",
    [
        {"template": [{"name": "default", "template": CHATML}, {"name": "rag", "template": "x"}]},
        {"chat_template__jinja": "\ufeff" + CHATML},
        {"chat_template__jinja": CHATML, "bare": True},
        {"chat_template__jinja": CHATML, "file": True},
    ],
)
def test_where_templates_lie(where, folder):
    bare, file = where.pop("bare", False), where.pop("file", False)
    path = folder(**where)
    if bare:
        (path / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(str(path / "tokenizer.json" if file else path))
    assert chat.rendered(tokenizer, "a").prompt.lstrip("\ufeff") == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_that_leaves_out_a_part(folder):
    """As templates of reasoning models do; and one that does not write the question."""
    tokenizer = load_tokenizer(str(folder(CHATML.replace("| trim", ".split('</think>')[-1] | trim"))))
    assert tokenize([RECORD], tokenizer, "chat", 99).queries
    with pytest.raises(UserError, match="record 1 does not write this answer as it stands: a part of it would not be learned"):
        tokenize([RECORD, RECORD | {"output": "<think>hm</think>3"}], tokenizer, "chat", 99)
    silent = load_tokenizer(str(folder("A:{{ messages[1]['content'] if messages[1:] else '' }}")))
    with pytest.raises(UserError, match="does not write a user's message"):
        tokenize([RECORD], silent, "chat", 99)


def test_ends_come_from_template_and_configs_together(folder):
    path = folder(CHATML, added=("<|im_start|>", "<|im_end|>"), generation_config__json='{"eos_token_id": [5, 2, null, true]}')
    (path / "config.json").write_text('{"eos_token_id": 6}')
    tokenizer = load_tokenizer(str(path))
    assert ends_of(tokenizer, "chat", path) == Ends((410, 2, 5, 6))
    assert ends_of(tokenizer, "mistral", path) == Ends((2, 410, 5, 6))
    (path / "generation_config.json").write_text("{oops")
    with pytest.raises(UserError, match=r"generation_config\.json, line 1: no whole JSON"):
        ends_of(tokenizer, "chat", path)


def test_an_answer_ends_at_each_of_its_ends():
    """Whichever of the tokens comes first; the others' rows go on."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
    model = build(PRESETS["mixtral-tiny"].replace(**sizes), key=jax.random.key(1))
    asked = [[5, 6, 7], [9, 8], [3]]
    free = generate(model, asked, max_new_tokens=6, end=-1)
    ends = [free[0][2], free[1][4]]
    expected = [before(np.array(row), ends) for row in free]
    assert generate(model, asked, max_new_tokens=6, end=ends) == expected and any(len(row) < 6 for row in expected)
    pieces = np.concatenate(list(stream(model, asked, max_new_tokens=6, end=ends)), axis=1)
    assert [before(row, ends) for row in pieces] == expected


def test_control_tokens_of_a_template_count_though_they_are_not_special(folder):
    """As DeepSeek's role marks: added tokens that are not special, and that only a template writes."""
    tokenizer = load_tokenizer(str(folder(CHATML, added=("<|im_start|>", "<|im_end|>"))))
    assert "<|im_start|>" in text_tokens(tokenizer).controls
    assert 409 not in text_tokens(tokenizer).as_text(["<|im_start|>system"])[0]
