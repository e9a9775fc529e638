"""The bundled task and its base's text, checked by reading the English again, not by the generator's own arithmetic."""

import json
import re
import sys
from itertools import pairwise
from operator import add, mul, sub

import pytest
from support import ROOT

from assets.problems import make as problems
from moejax import config as experiments
from moejax.data.templates import render
from moejax.data.tokenizer import load_tokenizer

PROBLEMS = ROOT / "assets" / "problems"
OPERATIONS = {"+": add, "-": sub, "*": mul}
EQUATION = re.compile(r"(\d+) ([+*-]) (\d+) = (\d+)\.")
RATIONALE = re.compile(rf"First {EQUATION.pattern} Then {EQUATION.pattern} The answer is (\d+)\.")
# What the words of a question mean: a phrase that only one kind of question has, and the signs of its two steps.
MEANINGS = {
    r"buys \d+ more and gives \d+ to": "+-",
    r"loses \d+ of them and finds \d+ new": "-+",
    r"on the table\. \w+ takes \d+ and \w+ takes \d+\.": "--",
    r"on Monday, \d+ on Tuesday and \d+ on Friday": "++",
    r"has \d+ more\. Then \w+ loses \d+": "+-",
    r"has \d+ fewer\. Then \w+ gets \d+ more": "-+",
    r"\d+ boxes with \d+ \w+ each and \d+ more": "*+",
    r"\d+ bags of \d+ \w+\. \w+ gives \d+ of the": "*-",
}


@pytest.fixture(scope="module")
def train():
    return json.loads((PROBLEMS / "train.json").read_text())


@pytest.fixture(scope="module")
def test():
    return json.loads((PROBLEMS / "test.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(ROOT / "assets" / "tiny-mixtral"))


@pytest.fixture(scope="module")
def pretraining():
    return [record["text"] for record in problems.make_pretraining(12_000)]


def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text)]


def kind(question):
    """Which kind of question it is: the only phrase of MEANINGS that it has."""
    found = [phrase for phrase in MEANINGS if re.search(phrase, question)]
    assert len(found) == 1, question
    return found[0]


def test_sizes_and_form(train, test):
    assert (len(train), len(test)) == (4000, 400)
    for record in train + test:
        assert list(record) == ["instruction", "input", "output", "answer"]
        assert all(isinstance(value, str) for value in record.values())
        assert record["instruction"].endswith("?") and record["input"] == ""
    assert sum(file.stat().st_size for file in PROBLEMS.iterdir()) < 1_500_000


def test_every_rationale_computes_what_its_question_asks(train, test):
    for record in train + test:
        parsed = RATIONALE.fullmatch(record["output"])
        assert parsed, record
        a, first, b, middle, again, second, c, end, answer = parsed.groups()
        assert OPERATIONS[first](int(a), int(b)) == int(middle), record
        assert OPERATIONS[second](int(again), int(c)) == int(end), record
        assert again == middle and answer == end == record["answer"], record
        assert numbers(record["instruction"]) == [int(a), int(b), int(c)], record
        assert first + second == MEANINGS[kind(record["instruction"])], record
        assert max(numbers(record["instruction"] + record["output"])) <= 99, record


def test_of_a_pair_the_rejected_answer_reads_its_question_wrongly(train):
    pairs = [json.loads(line) for line in (PROBLEMS / "pairs.jsonl").read_text().splitlines()]
    assert [(p["prompt"], p["chosen"]) for p in pairs] == [(r["instruction"], r["output"]) for r in train[:1200]]
    kinds = []
    for pair in pairs:
        (left, sign, right, result), *others = EQUATION.findall(pair["chosen"])
        found = EQUATION.findall(pair["rejected"])
        assert all(OPERATIONS[s](int(a), int(b)) == int(c) for a, s, b, c in found) and found[0][1:3] == (sign, right)
        assert pair["rejected"].endswith(f" {found[-1][3]}. The answer is {found[-1][3]}.") and found[-1][3] != others[0][3]
        misread = found[0] != (left, sign, right, result)
        kinds.append("one step" if len(found) == 1 else "number" if misread else "sign")
        if len(found) == 2:
            assert (found[1][1] == others[0][1]) is misread and (found[1][2], found[1][0]) == (others[0][2], found[0][3])
    assert kinds.count("number") == 400 and 250 < kinds.count("sign") <= 400


def test_a_question_asks_for_the_person_and_item_it_told_of(train, test):
    for record in train + test:
        story, question = re.fullmatch(r"(.*[.] )?(How many .*\?)", record["instruction"]).groups()
        item = re.match(r"How many (\w+)", question)[1]
        assert re.search(rf"\b{item}\b", story), record
        if asked := re.search(r"does (\w+) ", question):
            assert asked[1] in story, record


def test_held_out_problems_are_new(train, test):
    assert not {r["instruction"] for r in train} & {r["instruction"] for r in test}

    def cases(records):
        return [(kind(r["instruction"]), *numbers(r["instruction"])) for r in records]

    assert len({*cases(train), *cases(test)}) == len(train) + len(test)
    assert {kind(r["instruction"]) for r in train} == {kind(r["instruction"]) for r in test} == set(MEANINGS)


def test_the_command_remakes_the_committed_problems(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["problems", "task", str(tmp_path)])
    problems.main()
    for name in ("train.json", "test.json", "pairs.jsonl"):
        assert (tmp_path / name).read_bytes() == (PROBLEMS / name).read_bytes(), name
    assert problems.make_task(20, 0, seed=1) != problems.make_task(20, 0)


def test_the_command_writes_the_asked_number_of_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["problems", "pretrain", str(tmp_path / "new"), "--records", "300"])
    problems.main()
    lines = (tmp_path / "new" / "pretrain.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == problems.make_pretraining(300)
    assert len(lines) == 300


def test_pretraining_equations_are_right(pretraining):
    found = [equation for text in pretraining for equation in EQUATION.findall(text)]
    assert len(found) > len(pretraining)
    for left, sign, right, result in found:
        assert OPERATIONS[sign](int(left), int(right)) == int(result), (left, sign, right, result)
    assert max(max(numbers(text)) for text in pretraining) <= 99


def test_pretraining_answers_are_the_last_equation(pretraining):
    answered = [text for text in pretraining if "The answer is" in text]
    assert any(text.startswith("Compute") for text in answered) and any("How many" in text for text in answered)
    for text in answered:
        assert text.endswith(f" = {numbers(text)[-1]}. The answer is {numbers(text)[-1]}."), text


def test_pretraining_stories_add_up(pretraining):
    stories = [text for text in pretraining if re.search(r"\. Now \w+ has", text)]
    assert stories
    for text in stories:
        have, *changes = [s for s in text.split(". ") if s]
        count = numbers(have)[0]
        for change, now in zip(changes[::2], changes[1::2], strict=True):
            count += numbers(change)[0] * (-1 if re.search(r" (gives|loses) ", change) else 1)
            assert numbers(now) == [count], text


def test_pretraining_counts_by_even_steps(pretraining):
    counts = [numbers(text) for text in pretraining if text.startswith("Count: ")]
    assert counts
    assert all(len({b - a for a, b in pairwise(c)}) <= 1 for c in counts)


def test_the_base_sees_no_problem_of_the_task(pretraining, test):
    """No two-step question in any form, so none that is held out; what stands in `[INST]` marks has one step."""
    text = "\n".join(pretraining)
    chats = [t for t in pretraining if "[INST]" in t]
    assert chats and all(t.count("=") == 1 for t in chats)
    assert not any(re.search(phrase, text) for phrase in MEANINGS)
    assert not any(record["instruction"] in text for record in test)


def test_the_readme_says_how_many_held_out_rationales_are_not_new(train, test):
    texts = "\n".join(record["text"] for record in problems.make_pretraining(100_000))
    known = {found.group() for found in RATIONALE.finditer(texts)}
    seen = [record["output"] for record in test if record["output"] in known]
    products = [record["output"] for record in test if " * " in record["output"]]
    trained = {record["output"] for record in train}
    again = sum(record["output"] in trained for record in test)
    readme = " ".join((PROBLEMS / "README.md").read_text().split())
    assert f"rationale of {len(seen)} of the {len(test)} held-out problems" in readme
    assert f"{sum(' * ' in output for output in seen)} of those among the {len(products)} with a product" in readme
    assert f"{again} rationales of `test.json` occur in `train.json`" in readme


def test_tokenizer_is_lossless_on_the_domain(tokenizer, train, test, pretraining):
    prompts = [render("mistral", {**r}, tokenizer) for r in train + test]
    texts = [part for pair in prompts for part in pair] + [p + a for p, a in prompts] + pretraining[:3000]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert tokenizer.batch_decode(encoded) == texts
    assert not any(tokenizer.unk_token_id in ids for ids in encoded)


def test_tokenizer_has_numbers_and_markers_as_single_tokens(tokenizer):
    for n in range(100):
        assert len(tokenizer.encode(f" {n}", add_special_tokens=False)) == 1, n
    assert len(tokenizer) <= 512
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [0, 1, 2]
    marked = tokenizer.encode("[INST] 7 [/INST]", add_special_tokens=False)
    assert marked[0] == tokenizer.convert_tokens_to_ids("[INST]") and marked[-1] == tokenizer.convert_tokens_to_ids("[/INST]")


def test_tokenizer_replaces_unknown_characters_and_keeps_the_rest(tokenizer):
    ids = tokenizer.encode("Mia has 7 £ apples.", add_special_tokens=False)
    assert ids.count(tokenizer.unk_token_id) == 1
    assert tokenizer.decode(ids) == "Mia has 7 <unk> apples."


def test_queries_are_short(tokenizer, train, test):
    def length(record):
        return sum(len(tokenizer.encode(part, add_special_tokens=False)) for part in render("mistral", record, tokenizer)) + 1

    lengths = [length(record) for record in train + test]
    assert sum(lengths) / len(lengths) <= 64 and max(lengths) <= 64


def test_the_committed_tokenizer_is_the_one_the_command_trains(tmp_path):
    problems.make_tokenizer(tmp_path)
    made, committed = (
        json.loads((folder / "tokenizer.json").read_text()) for folder in (tmp_path, ROOT / "assets" / "tiny-mixtral")
    )
    assert made == committed


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_pretraining_config_fits_its_tokenizer(tokenizer, name):
    experiment = experiments.load(ROOT / "configs" / f"pretrain_tiny_{name}.yaml")
    architecture = experiment.model.architecture(None)
    assert max(tokenizer.get_vocab().values()) < architecture.vocab_size <= 512
    assert (architecture.bos_token_id, architecture.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert experiment.data.template == "text" and experiment.adapter is None
