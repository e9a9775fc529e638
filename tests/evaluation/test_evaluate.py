"""evaluate and write on sets of known truth: a model that says what it is told to, through the whole path of decoding."""

import errno
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import ROOT, SHARED
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from moejax.data.tokenize import prompts as prompt_ids
from moejax.data.tokenizer import load_tokenizer
from moejax.errors import UserError
from moejax.evaluation.answers import wilson_interval
from moejax.evaluation.evaluate import evaluate, write
from moejax.evaluation.tasks import Example, find, load
from moejax.models.build import build
from moejax.models.config import PRESETS

CONFIG = PRESETS["mixtral-tiny"].replace(vocab_size=512, hidden_size=32, num_layers=2, max_position_embeddings=256)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(ROOT / "assets/tiny-mixtral"))


@pytest.fixture(scope="module")
def untrained():
    return build(CONFIG, key=jax.random.key(0), dtype=jnp.float32)


class Scripted(nnx.Module):
    """Answers every prompt it knows with the tokens it was given, then the end token. It is asked as any model is."""

    def __init__(self, script, end):
        """script: {prompt tokens: answer tokens}."""
        self.config = CONFIG
        length = max(map(len, script.values())) + 1
        self.answers = nnx.Variable(jnp.array([[*a, *[end] * (length - len(a))] for a in script.values()], jnp.int32))
        self.marks = nnx.Variable(jnp.array([self.mark(np.array(p), np.arange(len(p))) for p in script], jnp.int32))
        assert len(set(self.marks.get_value().tolist())) == len(script)

    @staticmethod
    def mark(tokens, positions):
        return (tokens * (positions + 1)).sum(-1)

    def init_cache(self, batch, length):
        return jnp.zeros((batch, 2), jnp.int32)  # which prompt, and its length

    def cached(self, tokens, valid, positions, cache):
        if tokens.shape[1] > 1:
            row = jnp.argmax(self.mark(tokens * valid, positions)[:, None] == self.marks.get_value(), axis=1)
            cache = jnp.stack([row, valid.sum(1)], axis=1)
        step = jnp.maximum(positions + 1 - cache[:, 1:], 0)
        return jax.nn.one_hot(self.answers.get_value()[cache[:, :1], step], CONFIG.vocab_size), cache

    def logits(self, hidden):
        return hidden


def asked(tokenizer, task, said):
    """(model, examples) of {(question, expected): what the model says}."""
    examples = [Example({"instruction": q, "input": "", "output": ""}, expected) for q, expected in said]
    prompts = [tuple(ids) for ids in prompt_ids([e.record for e in examples], tokenizer, "mistral")[1]]
    answers = [tokenizer.encode(text, add_special_tokens=False) for text in said.values()]
    return Scripted(dict(zip(prompts, answers, strict=True)), tokenizer.eos_token_id), examples


NUMBERS = {  # (question, expected): (what the model says, the answer by gsm8k's rule, right)
    ("How many apples has Tom?", "12"): ("First 4 + 8 = 12. The answer is 12.", "12", True),
    ("How many?", "1234.5"): ("It is $1,234.50.", "1234.5", True),
    ("A long question, that falls into another bucket than the others do, for it goes on and on?", "-7"): ("= -7", "-7", True),
    ("How many coins has Ana?", "5"): ("The answer is 5. No, 6.", "6", False),
    ("How many eggs has Ben?", "3"): ("I do not know.", None, False),
    ("How many pens has Eva?", "2"): ("", None, False),
    ("How many balls has Max?", "8"): ("#### 8", "8", True),
}


def test_numbers(tokenizer):
    model, examples = asked(tokenizer, "gsm8k", {key: text for key, (text, _, _) in NUMBERS.items()})
    seen = []
    result = evaluate(
        model, tokenizer, find("gsm8k"), examples, max_new_tokens=40, rows=2, progress=lambda *counts: seen.append(counts)
    )
    assert (result.task, result.n, result.correct, result.accuracy) == ("gsm8k", 7, 4, 4 / 7)
    assert (result.low, result.high) == wilson_interval(4, 7)
    assert [(p["output"], p["answer"], p["correct"]) for p in result.predictions] == list(NUMBERS.values())
    assert [p["expected"] for p in result.predictions] == [expected for _, expected in NUMBERS]
    assert [p["prompt"] for p in result.predictions] == [f"[INST] {question} [/INST]" for question, _ in NUMBERS]
    said = [len(tokenizer.encode(text, add_special_tokens=False)) for text, _, _ in NUMBERS.values()]
    assert result.generated_tokens == sum(said)
    assert seen == [(1, 7), (3, 7), (5, 7), (7, 7)]  # the long one, then the others in twos
    strict = evaluate(model, tokenizer, find("gsm8k-strict"), examples, max_new_tokens=40, rows=2)
    assert strict.task == "gsm8k-strict" and [p["correct"] for p in strict.predictions] == [False] * 6 + [True]


def test_answer_words(tokenizer):
    said = {
        ("one", "ending2"): "the correct answer is ending2",
        ("two", "ending2"): "ending1 or ending2",
        ("three", "ending3"): "the answer is ending 3",
        ("four", "ending4"): "ending4",
    }
    model, examples = asked(tokenizer, "hellaswag-generated", said)
    result = evaluate(model, tokenizer, find("hellaswag-generated"), examples, max_new_tokens=24, rows=8)
    assert [p["answer"] for p in result.predictions] == ["ending2", "ending1", None, "ending4"]
    assert (result.correct, result.n) == (2, 4)


def test_an_answer_that_does_not_end(tokenizer):
    model, examples = asked(tokenizer, "gsm8k", {("a", "3"): "1 2 3 4 5 6 7 8"})
    result = evaluate(model, tokenizer, find("gsm8k"), examples, max_new_tokens=5, rows=1)
    assert result.generated_tokens == 5 and result.predictions[0]["output"] in "1 2 3 4 5 6 7 8"


def test_written_and_replaced(tokenizer, tmp_path, monkeypatch):
    """A full disk leaves what was there."""
    model, examples = asked(tokenizer, "gsm8k", {("a", "3"): "3 – drei", ("b", "4"): "5"})
    folder = tmp_path / "eval" / "gsm8k"
    for count in (2, 1):
        result = evaluate(model, tokenizer, find("gsm8k"), examples[:count], max_new_tokens=9, rows=2)
        write(result, folder)
        lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        assert lines == result.predictions and len(lines) == count
        assert set(lines[0]) == {"prompt", "output", "answer", "expected", "correct"}
        summary = json.loads((folder / "result.json").read_text())
        assert summary | {"predictions": lines} == vars(result)
        assert sorted(p.name for p in folder.iterdir()) == ["predictions.jsonl", "result.json"]
    before = {path: path.read_bytes() for path in folder.iterdir()}

    def full(path, *_, **__):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"eval/gsm8k: the answers could not be kept there \(No space left on device\)"):
        write(result, folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_the_template_of_the_run(tokenizer, untrained):
    example = Example({"instruction": "one", "input": "two", "output": ""}, "1")
    for template, text in (("mistral", "[INST] one\ntwo [/INST]"), ("text", "one\ntwo")):
        result = evaluate(untrained, tokenizer, find("gsm8k"), [example], max_new_tokens=1, rows=1, template=template)
        assert result.predictions[0]["prompt"] == text


def test_bad_input(tokenizer, untrained):
    def run(instruction="one", task="gsm8k", examples=None, new=8, rows=2, t=tokenizer):
        example = Example({"instruction": instruction, "input": "", "output": ""}, "1")
        return evaluate(untrained, t, find(task), [example] if examples is None else examples, max_new_tokens=new, rows=rows)

    with pytest.raises(
        UserError, match=r"gsm8k, example 0: .* tokens and 8 new ones exceed the model's 256 positions: shorten"
    ):
        run("word " * 300)
    with pytest.raises(UserError, match="gsm8k: there are no examples"):
        run(examples=[])
    with pytest.raises(UserError, match="rows = 0"):
        run(rows=0)
    with pytest.raises(UserError, match="max_new_tokens = 0"):
        run(new=0)

    class Endless:
        eos_token_id = None

    with pytest.raises(UserError, match="the tokenizer names no end-of-sequence token"):
        run(t=Endless())

    mute = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()), eos_token="</s>")  # no letter is in its vocabulary
    with pytest.raises(UserError, match="gsm8k, example 0: its prompt is empty"):
        run(t=mute)


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs the shared data sets")
def test_real_data_on_a_tiny_model(tokenizer):
    model = build(CONFIG.replace(max_position_embeddings=4096), key=jax.random.key(0), dtype=jnp.float32)
    for name, file in (("gsm8k", "gsm8k_test"), ("hellaswag-generated", "hellaswag_test_500_rebuilt")):
        examples = load(find(name), str(SHARED / "data" / f"{file}.json"), limit=4)
        assert evaluate(model, tokenizer, find(name), examples, max_new_tokens=8, rows=4).n == 4
