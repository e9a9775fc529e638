"""The study's tokens behind GPT-NeoX's own: rows that BlackMamba's padded vocabulary has."""

import pytest
from support import ROOT, SHARED

from moejax.data.sources import Record
from moejax.data.tokenize import tokenize
from moejax.data.tokenizer import check_vocabulary, load_tokenizer

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
