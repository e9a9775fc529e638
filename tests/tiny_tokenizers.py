"""Small tokenizers of the kinds that llama.cpp knows, made on the spot."""

import json

from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from moejax.data import gguf_tokenizer


def split(*expressions):
    parts = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
    return pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


PRE = {
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False), False),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]), False),
    "qwen2": (split(gguf_tokenizer._QWEN2), False),
    "smaug-bpe": (split(gguf_tokenizer._LLAMA3), False),
    "llama-bpe": (split(gguf_tokenizer._LLAMA3), True),
}
"""llama.cpp's name -> a pre-tokenizer, and whether words of the vocabulary need no merges."""


def byte_level(pre="gpt-2", size=400, texts=("a text of the train, and the training of 1234 texts: don't!\n\n  It's there.",)):
    """A byte-level BPE with ChatML's tokens, <think> as a token that is no control token, and an end of sequence."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=PRE[pre][1]))
    tokenizer.pre_tokenizer = PRE[pre][0]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def sentencepiece(merges=("▁ a", "b c", "▁a bc"), **changes):
    """Mixtral's kind, with a few merges."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "c"]
    names += [merge.replace(" ", "") for merge in merges]
    content = {
        "version": "1.0", "truncation": None, "padding": None, "pre_tokenizer": None, "decoder": None,
        "added_tokens": [
            {"id": i, "content": names[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
            for i in range(3)
        ],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "post_processor": json.loads(TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]).__getstate__()),
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "merges": list(merges),
                  "vocab": {name: i for i, name in enumerate(dict.fromkeys(names))}},
    } | changes  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="</s>", unk_token="<unk>")
