"""An Ollama Modelfile says how the run's template writes prompts."""

import pytest
from tiny_tokenizers import byte_level, sentencepiece

from moejax.data import chat
from moejax.data.ends import ends_of
from moejax.data.ollama import modelfile

CHATML = (
    'TEMPLATE """{{ range $i, $m := .Messages }}{{ if eq $m.Role "user" }}{{ if eq $i 0 }}<|im_start|>user\n'
    '{{ end }}{{ $m.Content }}<|im_end|>\n<|im_start|>assistant\n'
    '{{ else if eq $m.Role "assistant" }}{{ $m.Content }}<|im_end|>\n<|im_start|>user\n'
    '{{ else if and (eq $m.Role "system") (eq $i 0) }}<|im_start|>system\n{{ $m.Content }}<|im_end|>\n<|im_start|>user\n'
    '{{ end }}{{ end }}"""\n'
)  # fmt: skip


def text_of(tokenizer, template, generation=None, adds_bos=False):
    return modelfile("run-f16.gguf", tokenizer, template, ends_of(tokenizer, template), generation or {}, adds_bos)


def test_chatml():
    tokenizer = byte_level()
    chat.settle(tokenizer, "chatml", {}, None)
    text, told = text_of(tokenizer, "chatml")
    assert told and text == f'FROM ./run-f16.gguf\n{CHATML}PARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\n'


@pytest.mark.parametrize(("template", "begin", "asks"), [
    ("mistral", "[INST] ", " [/INST]"),
    ("alpaca", "### Instruction:\n", "\n\n### Response:\n"),
])  # fmt: skip
def test_templates_of_ours(template, begin, asks):
    text, told = text_of(sentencepiece(), template, adds_bos=True)
    assert told and f"{begin}{{{{ end }}}}{{{{ $m.Content }}}}{asks}{{{{ else" in text and 'PARAMETER stop "</s>"' in text
    # What follows an answer: its end, and how the next question begins.
    assert '(eq $m.Role "assistant")' not in text and "{{ $m.Content }}</s>" in text


def test_a_chat_template_with_a_begin_that_the_tokenizer_adds_and_none_for_a_system():
    tokenizer = sentencepiece()
    tokenizer.bos_token = "<s>"
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
        "{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
    )
    text, told = text_of(tokenizer, "chat", adds_bos=True)
    assert told and "<s>" not in text.replace("</s>", "") and '"system"' not in text
    assert "<s>[INST] " in text_of(tokenizer, "chat", adds_bos=False)[0]


def test_a_template_that_is_not_told_by_pieces():
    tokenizer = byte_level()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ loop.index }}: {{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}{{ messages | length + 1 }}: {% endif %}"
    )
    text, told = text_of(tokenizer, "chat")
    assert not told and "TEMPLATE" not in text and text.startswith("FROM ./run-f16.gguf\n")


def test_sampling_as_the_base_has_it():
    sampled = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}
    lines = text_of(sentencepiece(), "mistral", sampled)[0].splitlines()
    assert lines[-4:] == ["PARAMETER temperature 0.7", "PARAMETER top_p 0.8", "PARAMETER top_k 20", "PARAMETER repeat_penalty 1.05"]
    assert "temperature" not in text_of(sentencepiece(), "mistral", sampled | {"do_sample": False})[0]
