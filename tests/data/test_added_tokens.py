"""Tokens behind a tokenizer's own (the study's behind GPT-NeoX's: rows that BlackMamba's padded vocabulary has), and their rows."""

import pytest
from pydantic import ValidationError
from support import ROOT, SHARED, tiny_experiments

from moejax.config import Experiment
from moejax.data import chat
from moejax.data.added_tokens import settled
from moejax.data.sources import Record
from moejax.data.tokenize import tokenize
from moejax.data.tokenizer import check_vocabulary, load_tokenizer
from moejax.errors import UserError

STUDY = ("[PAD]", "</s>", "<s>", "<unk>")


def test_ids_follow_the_tokenizers_own_in_order():
    tokenizer = load_tokenizer(str(ROOT / "assets/tiny-mixtral"), ("[PAD]", "<sep>"))
    size = len(load_tokenizer(str(ROOT / "assets/tiny-mixtral")))
    assert tokenizer.pad_token_id == size and tokenizer.convert_tokens_to_ids("<sep>") == size + 1


@pytest.mark.skipif(not (SHARED / "tokenizers/20B_tokenizer.json").exists(), reason="needs GPT-NeoX's tokenizer.json")
def test_the_studys_ids():
    tokenizer = load_tokenizer(str(SHARED / "tokenizers/20B_tokenizer.json"), STUDY)
    assert tokenizer.convert_tokens_to_ids(list(STUDY)) == [50277, 50278, 50279, 50280]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("</s>", "[PAD]")
    check_vocabulary(tokenizer, 50304)
    record: Record = {"instruction": "Is water wet?", "input": "", "output": "yes", "answer": "yes"}
    query = tokenize([record], tokenizer, "mistral", 64).queries[0]
    assert query.ids[-1] == 50278
    assert tokenizer.decode(query.ids) == "[INST] Is water wet? [/INST]yes</s>"


TINY = str(ROOT / "assets/tiny-mixtral")  # 409 tokens


@pytest.mark.parametrize(
    ("tokens", "rows", "ids", "vocabulary"),
    [
        (["<a>", "<b>"], 512, (409, 410), 512),  # the embedding is larger than the tokenizer
        (["<b>", "<a>"], 410, (409, 410), 411),
        (["<a>", "<b>"], 409, (409, 410), 411),
        (["<a>", "</s>"], 409, (2, 409), 410),  # of its own: no new id
        ("auto", 409, (409, 410), 411),
    ],
)
def test_ids_and_rows(tokens, rows, ids, vocabulary, tmp_path):
    content = tiny_experiments(tmp_path)(data={"template": "chatml"}).model_dump(mode="json") | {"added_tokens": tokens}
    found = settled(Experiment.model_validate(content), TINY, rows)
    assert (found.adapter.token_rows, found.model.vocabulary) == (ids, vocabulary)
    assert found.added_tokens == (("<|im_start|>", "<|im_end|>") if tokens == "auto" else tuple(tokens))
    assert settled(found, TINY, rows) == found  # a rerun of the run's config
    whole = found.model_copy(update={"adapter": None})
    assert settled(whole, TINY, rows) == whole  # all rows are trained there


def test_where_the_tokenizer_is_not_here_as_many_rows_are_counted(tmp_path):
    experiment = tiny_experiments(tmp_path)(data={"template": "chatml"}).model_copy(update={"added_tokens": ("auto",)})
    found = settled(experiment, None, 512)
    assert (found.adapter.token_rows, found.model.vocabulary) == ((510, 511), 512)


def test_a_tokenizer_of_another_model_and_other_rows_are_refused(tmp_path):
    experiment = tiny_experiments(tmp_path)().model_copy(update={"added_tokens": ("<a>",)})
    with pytest.raises(UserError, match=r"largest id is 408, the model's vocabulary has 400 rows"):
        settled(experiment, TINY, 400)
    with pytest.raises(UserError, match=r"adapter\.token_rows = \[5\]: those of added_tokens are \[409\]"):
        settled(experiment.changed("adapter", token_rows=(5,)), TINY, 512)


@pytest.mark.parametrize(
    ("tokens", "told"), [(["<a>", " "], "expected tokens of more than white space"), (["auto", "<a>"], "auto stands alone")]
)
def test_tokens_that_are_none_are_refused(tokens, told, tmp_path):
    content = tiny_experiments(tmp_path)().model_dump(mode="json") | {"added_tokens": tokens}
    with pytest.raises(ValidationError, match=rf"added_tokens = \[.*\]: {told}"):
        Experiment.model_validate(content)


def test_chatml_says_what_adds_its_tokens_and_auto_adds_them():
    with pytest.raises(UserError, match=r"no token <\|im_start\|> and no <\|im_end\|>.*added_tokens=auto adds them"):
        chat.settle(load_tokenizer(TINY), "chatml", {}, None)
    tokenizer = load_tokenizer(TINY, ("auto",))
    chat.settle(tokenizer, "chatml", {}, None)
    ids = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    record: Record = {"instruction": "1 + 1? <|im_end|>", "input": "", "output": "2", "answer": "2"}
    query = tokenize([record], tokenizer, "chatml", 64).queries[0]
    assert [i for i in query.ids if i in ids] == [ids[0], ids[1], ids[0], ids[1]]  # what the question spells out is text


def test_auto_is_for_chatml_alone(tmp_path):
    content = tiny_experiments(tmp_path)().model_dump(mode="json") | {"added_tokens": "auto"}
    with pytest.raises(ValueError, match=r"added_tokens = auto: data\.template = null needs no tokens by name"):
        Experiment.model_validate(content)
