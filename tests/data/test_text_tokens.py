"""What a user wrote is text: no control token comes of it, in no field, no template and no tokenizer; and every other id is as before."""

import json

import numpy as np
import pytest
from support import ROOT, SHARED
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerFast

from moejax.data.pipeline import load
from moejax.data.records import blank
from moejax.data.templates import render
from moejax.data.text_tokens import text_tokens
from moejax.data.tokenize import prompts, tokenize
from moejax.data.tokenizer import load_tokenizer
from moejax.errors import UserError

TINY = str(ROOT / "assets/tiny-mixtral")
SHARED_TOKENIZERS = [p for p in (SHARED / "tokenizers" / f"{n}_tokenizer.json" for n in ("mistral_v1", "20B")) if p.exists()]
SPOKEN = ["<s>strike</s>", "a [/INST] b", "</s>", " </s> [INST]", "<unk><s></s>"]


def record(instruction="Tom has 3 apples.", output="3.", input=""):
    return {"instruction": instruction, "input": input, "output": output}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


@pytest.mark.parametrize("template", ["mistral", "alpaca"])
@pytest.mark.parametrize("field", ["instruction", "input", "output"])
@pytest.mark.parametrize("text", SPOKEN)
def test_a_control_token_in_a_text_is_text(template, field, text, tokenizer):
    specials = set(tokenizer.backend_tokenizer.get_added_tokens_decoder())
    plain = tokenize([record(input="x")], tokenizer, template, 999).queries[0]
    found = tokenize([record(input="x") | {field: text}], tokenizer, template, 999)
    ids = found.queries[0].ids
    assert [i for i in ids if i in specials] == [i for i in plain.ids if i in specials], "only the template's own, and one end"
    assert tokenizer.decode(ids) == "".join(render(template, record(input="x") | {field: text}, tokenizer)) + "</s>"
    assert (found.marked, found.first_marked[0]) == (1, 0)
    shown, (asked,) = prompts([record(input="x") | {field: text}], tokenizer, template)
    assert asked == ids[~found.queries[0].supervised].tolist() and shown == [tokenizer.decode(asked)]


def test_a_text_with_its_marks_written_in_it_is_taken_as_written_and_counted(tokenizer):
    found = tokenize([{"text": "[INST] Tom has 3 apples. [/INST] 3."}], tokenizer, "text", 99)
    assert found.queries[0].ids.tolist()[0] == tokenizer.convert_tokens_to_ids("[INST]") and found.marked == 1


def made(normalizer=None, pre=None, end=True, **flags):
    """A tokenizer of letters, with a control token `<x>`, an added token `<w>` that is none, and the control token `</x>` if `end`."""
    letters = "▁ĠABCabc<>/x·wrtin 12"
    vocabulary = {"?": 0} | {c: i + 1 for i, c in enumerate(letters)}
    backend = Tokenizer(BPE(vocabulary, [], unk_token="?"))
    if normalizer:
        backend.normalizer = normalizer
    if pre:
        backend.pre_tokenizer = pre
    backend.add_tokens([AddedToken("<w>", special=False)])
    backend.add_special_tokens([AddedToken("<x>", special=True, **flags), *([AddedToken("</x>", special=True)] if end else [])])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</x>" if end else "<x>")


LEGACY = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
KINDS = [
    {}, {"lstrip": True, "rstrip": True}, {"normalized": True}, {"single_word": True}, {"normalizer": LEGACY},
    {"normalizer": normalizers.Lowercase(), "normalized": True},
    *({"pre": pre_tokenizers.Metaspace(prepend_scheme=scheme)} for scheme in ("first", "always", "never")),
    {"pre": pre_tokenizers.ByteLevel(add_prefix_space=True)},
]  # fmt: skip
WRITTEN = ["<x> ab @ <x>", "<x>ab@", " <x>  @ a</ x><x>", "@a<w>b <w>", "a b@<x>", "@", "<x>@@<x> @ ", "A<X>B @", "1<x>2 @", "@<x>a"]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_only_the_users_control_tokens_are_text(kind):
    """As by the same tokenizer without this control token: spaces around tokens, borders, each of their flags, other added tokens."""
    without = made(**kind, end=False).backend_tokenizer
    tokens = text_tokens(made(**kind))
    for written in WRITTEN:
        rendered = written.replace("@", tokens.guard("</x>"))
        assert tokens.encode([rendered]) == [without.encode(written.replace("@", "</x>"), add_special_tokens=False).ids], written
        assert tokens.shown(rendered) == written.replace("@", "</x>")


@pytest.mark.parametrize(
    ("normalizer", "text"),
    [(normalizers.NFKC(), "\uff1c/x\uff1e"), (normalizers.Lowercase(), "</X>"), (None, "\U0010f8f0 </x> \U0010f8f0")],
)
def test_what_a_tokenizer_reads_as_a_control_token_is_text(normalizer, text):
    """However it is spelled; and a text may hold the letter that stands for what is guarded."""
    backend = made(normalizer).backend_tokenizer
    backend.add_special_tokens([AddedToken("</x>", special=True, normalized=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</x>")
    end = tokenizer.eos_token_id
    assert not normalizer or end in tokenizer.encode(text, add_special_tokens=False)
    (guarded,), (bare,) = text_tokens(tokenizer).as_text([text]), text_tokens(tokenizer).encode([text + " <x>"])
    assert end not in guarded and bare[-1] == tokenizer.convert_tokens_to_ids("<x>")


def test_a_model_that_builds_a_control_token_of_letters_does_not():
    pieces = [("<unk>", 0.0), ("</x>", -1.0), *((letter, -2.0) for letter in "</x>ab")]
    backend = Tokenizer(Unigram(pieces, unk_id=0))
    backend.add_special_tokens([AddedToken("</x>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</x>")
    backend.encode_special_tokens = True
    assert backend.encode("a</x>").ids[-1] == 1, "the model's own way"
    backend.encode_special_tokens = False
    assert text_tokens(tokenizer).as_text(["a</x>b"]) == [[backend.token_to_id(letter) for letter in "a</x>b"]]


@pytest.mark.parametrize("path", SHARED_TOKENIZERS, ids=lambda p: p.stem)
def test_ordinary_records_have_the_ids_that_they_had(path):
    """Real text, in the tokenizers of both studied models."""
    tokenizer = load_tokenizer(str(path))
    records = json.loads((SHARED / "data/math_1000_standin.json").read_text())[:150]
    for template in ("mistral", "alpaca"):
        for query, made_of in zip(tokenize(records, tokenizer, template, 9999).queries, records, strict=True):
            parts = [tokenizer.encode(text, add_special_tokens=False) for text in render(template, made_of, tokenizer)]
            np.testing.assert_array_equal(query.ids, [*parts[0], *parts[1], tokenizer.eos_token_id])


@pytest.mark.skipif(not SHARED_TOKENIZERS, reason="Mixtral's tokenizer is not beside the project")
def test_marks_that_are_no_tokens_are_counted():
    """[/INST] is plain text in Mixtral's first tokenizer: nothing tells the user's from the template's, so the user is reported."""
    tokenizer = load_tokenizer(str(SHARED_TOKENIZERS[0]))
    found = tokenize([record(), record("Explain [/INST] to me")], tokenizer, "mistral", 99)
    assert (found.marked, found.first_marked) == (1, (1, "[/INST]"))
    context, end = tokenize([record("a </s> b")], tokenizer, "mistral", 99).queries[0].ids, tokenizer.eos_token_id
    assert (context == end).sum() == 1


@pytest.mark.parametrize("seen", ["", "   ", "\n\t", "\u200b\ufeff", "\u00a0\u2003", "\x00\x07", "\u3164", "\u2060\u200d", "\ufe0f\u034f"])
def test_what_is_not_seen_is_dropped_and_counted(seen, tokenizer, tmp_path):
    assert blank(seen)
    records = [record(), record(output=seen), record(seen), record(seen, input="Tom"), record(output="0")]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records))
    from moejax.config_data import DataConfig

    data = load(DataConfig(source=str(path), row_tokens=64, max_length=64), tokenizer, 0, 512)
    counts = data.statistics()
    assert [counts[n] for n in ("records", "dropped", "  blank answers", "  blank questions", "queries")] == [5, 2, 1, 1, 3]
    with pytest.raises(UserError, match=r"a\.json: no query has a supervised token left: of 1 records 1 have a blank answer"):
        tokenize(records[1:2], tokenizer, "mistral", 64, "a.json")


def test_a_new_emoji_or_a_single_mark_is_seen():
    assert not any(blank(text) for text in ("\U0001fae9", ".", "\u0301", "0"))


def test_a_tokenizer_that_cuts_does_not(tmp_path):
    """tokenizer.json may hold a truncation: what is cut is cut at data.max_length, and counted."""
    content = json.loads((ROOT / "assets/tiny-mixtral/tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    found = tokenize([record()], load_tokenizer(str(tmp_path)), "mistral", 99)
    assert len(found.queries[0].ids) == len(tokenize([record()], load_tokenizer(TINY), "mistral", 99).queries[0].ids)


def test_the_user_is_told(tokenizer, tmp_path):
    from moejax.config_data import DataConfig

    path = tmp_path / "a.json"
    path.write_text(json.dumps([record(), record(output="The tag <s>.")]))
    *_, note = load(DataConfig(source=str(path), row_tokens=64, max_length=64), tokenizer, 0, 512).notes()
    assert note == "1 record holds control tokens or the template's marks (first: record 1, '<s>'): kept, as text"


def test_letters_that_the_tokenizer_lacks_are_counted(tokenizer, tmp_path):
    from moejax.config_data import DataConfig

    path = tmp_path / "a.json"
    talk = {"messages": [{"role": "user", "content": "Tom"}, {"role": "assistant", "content": "is \u65e5"}]}
    for records, first in (([record(), record("caf\u00e9 \u65e5", "<unk>")], "record 1, '\u00e9'"), ([talk, talk], "record 0, '\u65e5'")):
        path.write_text(json.dumps(records))
        data = load(DataConfig(source=str(path), row_tokens=64, max_length=64, template="mistral"), tokenizer, 0, 512)
        assert data.statistics()["unknown tokens"] == sum((q.ids == tokenizer.unk_token_id).sum() for q in data.train.queries) == 2
        assert any(note.startswith(f"2 tokens are the tokenizer's unknown one (first: {first}): it has") for note in data.notes())
