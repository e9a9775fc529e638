"""A tokenizer as llama.cpp's metadata, and what of one it cannot hold."""

import json

import pytest
from support import ROOT
from tiny_tokenizers import PRE, byte_level, sentencepiece, split
from tokenizers import AddedToken, Tokenizer, models
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from moejax.data import gguf_tokenizer
from moejax.data.gguf_tokenizer import metadata
from moejax.data.tokenizer import load_tokenizer
from moejax.errors import UserError


@pytest.mark.parametrize("pre", PRE)
def test_byte_level(pre):
    tokenizer = byte_level(pre)
    rows = len(tokenizer) + 2
    found = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata(tokenizer, rows, [0, 2]).items()}
    assert (found["model"], found["pre"]) == ("gpt2", pre)
    assert found["tokens"] == [*tokenizer.convert_ids_to_tokens(range(rows - 2)), f"[PAD{rows - 2}]", f"[PAD{rows - 1}]"]
    types = {name: found["token_type"][found["tokens"].index(name)] for name in ("<|im_end|>", "a", "<think>", f"[PAD{rows - 1}]")}
    assert types == {"<|im_end|>": 3, "a": 1, "<think>": 4, f"[PAD{rows - 1}]": 5}
    assert found["merges"] == [" ".join(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    assert (found["eos_token_id"], found["eot_token_id"], found["padding_token_id"]) == (0, 2, 0) and "bos_token_id" not in found
    assert (found["add_bos_token"], found["add_eos_token"]) == (False, False)


def test_sentencepiece():
    """The earlier a token's merges, the higher its score."""
    tokenizer = sentencepiece()
    found = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata(tokenizer, 266, [2]).items()}
    assert (found["model"], found["pre"], found["add_space_prefix"]) == ("llama", "default", True)
    scores = dict(zip(found["tokens"], found["scores"], strict=True))
    assert scores["▁a"] > scores["bc"] > scores["▁abc"] > scores["a"]
    assert [found["token_type"][i] for i in (0, 1, 2, 3, 258, 259, 264, 265)] == [2, 3, 3, 6, 6, 1, 1, 1]
    assert (found["bos_token_id"], found["eos_token_id"], found["unknown_token_id"]) == (1, 2, 0)
    assert (found["add_bos_token"], found["add_eos_token"]) == (True, False)


def test_runs_of_spaces_have_one_score():
    """Their merges lie among each other's: in Mixtral's tokenizer too."""
    found = metadata(sentencepiece(("b c", "▁▁ ▁▁", "▁▁ ▁", "▁ ▁▁▁", "▁ ▁▁", "▁▁▁ ▁", "▁ ▁")), 267, [2])
    scores = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True))
    assert scores["bc"] > scores["▁▁▁▁"] == scores["▁▁▁"]


@pytest.mark.parametrize(("scheme", "prompt", "expected"), [
    ("always", "<s>a", True), ("never", "a", False), ("first", "a bc", True), ("first", "<s>a bc", False),
])  # fmt: skip
def test_spaces_before_a_text(scheme, prompt, expected):
    """Before the first piece alone is no choice in llama.cpp: the run's prompts decide."""
    pre = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    tokenizer = sentencepiece(normalizer=None, pre_tokenizer=pre)
    assert metadata(tokenizer, 266, [2], prompt)["tokenizer.ggml.add_space_prefix"] == expected
    assert gguf_tokenizer.spaces_first(tokenizer) == (scheme == "first")


def test_template_and_special_tokens():
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert metadata(tokenizer, len(tokenizer), [0])["tokenizer.chat_template"] == tokenizer.chat_template


def refused(tokenizer, match):
    with pytest.raises(UserError, match=match) as caught:
        metadata(tokenizer, 512, [2])
    assert "--without-tokenizer" in str(caught.value)


def test_a_pre_tokenizer_that_llama_cpp_does_not_know():
    tokenizer = load_tokenizer(str(ROOT / "assets/tiny-mixtral"))
    refused(
        tokenizer, r"llama.cpp cannot hold this tokenizer: it knows no such pre-tokenizer as Metaspace and Split by \[\.,\?\], but "
        "those of gpt-2, smollm, qwen2, smaug-bpe, llama-bpe. --without-tokenizer writes"
    )  # fmt: skip


def test_what_llama_cpp_has_no_word_for():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = split(r"\p{N}{1,2}")
    refused(tokenizer, "it knows no such pre-tokenizer as")
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
    refused(tokenizer, "its added token '<mask>' has lstrip")
    tokenizer = byte_level()
    around = TemplateProcessing(single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)])
    tokenizer.backend_tokenizer.post_processor = around
    refused(tokenizer, r"it puts \['<\|im_start\|>'\] before a text and \['<\|im_end\|>'\] behind it")
    refused(sentencepiece(("a b", "▁ a", "▁ ab")), "'▁a' and 'b' are '▁ab' by its vocabulary and not by its merges")
    refused(sentencepiece(("b c", "▁a bc", "▁ a", "a bc", "▁ abc")), "the merges of its token '▁a' are among another's")
    refused(sentencepiece(normalizer={"type": "Lowercase"}), "its normalizer is Lowercase, its pre-tokenizer ")
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    refused(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="b"), "its model is WordLevel")
