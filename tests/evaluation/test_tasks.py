"""Tasks: their names and rules, and their examples from files and from `datasets`."""

import json

import pytest
from support import ROOT, SHARED

from moejax.errors import UserError
from moejax.evaluation.tasks import SETS, TASKS, find, load

# A made-up question of each set in LLM-Adapters' text, and its answer.
TEXTS = {
    "hellaswag": (
        "Please choose the correct ending to complete the given sentence: Baking: She takes the bread out. She\n\n"
        "Ending1: eats it. Ending2: sings to it. Ending3: sells it. Ending4: flies off.\n\n"
        "Answer format: ending1/ending2/ending3/ending4",
        "ending3",
    ),
    "boolq": (
        "Please answer the following question with true or false, question: is the sea salty?\n\nAnswer format: true/false", "true",
    ),
    "piqa": (
        "Please choose the correct solution to the question: dry a cup\n\nSolution1: use a towel\n\nSolution2: use a lake\n\n"
        "Answer format: solution1/solution2",
        "solution1",
    ),
    "siqa": (
        "Please choose the correct answer to the question: Ana ate. Why?\n\nAnswer1: joy Answer2: hunger Answer3: rain\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer2",
    ),
    "winogrande": (
        "Please choose the correct answer to fill in the blank to complete the given sentence: The cup broke the plate as _ was hard."
        "\n\nOption1: cup Option2: plate Answer format: option1/option2",
        "option1",
    ),
} | dict.fromkeys(
    ("arc-easy", "arc-challenge", "openbookqa"),
    (
        "Please choose the correct answer to the question: What melts?\n\nAnswer1: ice Answer2: fire Answer3: air Answer4: iron\n\n"
        "Answer format: answer1/answer2/answer3/answer4",
        "answer1",
    ),
)  # fmt: skip


def written(tmp_path, *records, name="data.json"):
    path = tmp_path / name
    path.write_text(json.dumps(list(records)))
    return str(path)


def test_names():
    assert set(TASKS) == {"gsm8k", "gsm8k-strict", "problems"} | {f"{s}-generated" for s in SETS}
    assert set(TEXTS) == set(SETS)
    assert all(find(name).name == name for name in TASKS)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("gsm8", "gsm8k"),
        ("hellaswag", "hellaswag-generated"),
        ("hellaswag-loglikelihood", r"hellaswag-generated.*log-likelihoods, and every other task, are lm-evaluation-harness's"),
        ("winogrnde-generated", "winogrande-generated"),
    ],
)
def test_an_unknown_task_names_the_nearest(name, near):
    with pytest.raises(UserError, match=f"unknown task '{name}': did you mean .*{near}"):
        find(name)
    with pytest.raises(UserError, match="unknown task 'zzzz': there are gsm8k, "):
        find("zzzz")


@pytest.mark.parametrize("name", TEXTS)
def test_llm_adapters_text(name, tmp_path):
    text, expected = TEXTS[name]
    record = {"instruction": text, "input": "", "output": f"the correct answer is {expected}"}
    (example,) = load(find(f"{name}-generated"), written(tmp_path, record | {"answer": expected}))
    assert (example.record, example.expected) == (record, expected)


@pytest.mark.parametrize(
    ("name", "output", "answer"),
    [
        ("hellaswag-generated", "the correct answer is ending2", "ending2"),
        ("hellaswag-generated", "ending4, not ending1", "ending4"),
        ("hellaswag-generated", "Ending2", None),
        ("hellaswag-generated", "ending5", None),
        ("boolq-generated", "it is not false but true", "false"),
        ("piqa-generated", "solution3 solution2", "solution2"),
        ("siqa-generated", "answer 3", None),
        ("winogrande-generated", "theoption1", "option1"),
        ("gsm8k", "3 + 4 = 7.", "7"),
        ("gsm8k", "I owe 1,234,567,890,123 cents", "1234567890123"),
        ("gsm8k-strict", "The answer is 7.", None),
        ("gsm8k-strict", "7\n#### 7", "7"),
    ],
)
def test_answers(name, output, answer):
    """Of the choices the first answer word as it is written in LLM-Adapters' evaluation: case counts, surroundings do not."""
    assert find(name).answer(output) == answer


def test_numbers_are_compared_as_numbers():
    task = find("gsm8k")
    assert task.right("576", "576.0") and task.right("0.5", ".50") and not task.right("576", "577")


def test_gsm8k_in_its_own_columns(tmp_path):
    record = {"question": "2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 1,004"}
    for name in ("gsm8k", "gsm8k-strict"):
        (example,) = load(find(name), written(tmp_path, record))
        assert example.expected == "1004"
        assert example.record == {"instruction": "2 + 2?", "input": "", "output": record["answer"]}


def test_the_bundled_problems():
    examples = load(find("problems"), str(ROOT / "assets/problems/test.json"), limit=3)
    assert [e.expected for e in examples] == ["77", "10", "25"]


def test_a_name_for_datasets(tmp_path):
    """With the task's configuration and split, or another split. A folder is to `datasets` what a name on the Hub is."""
    folder = tmp_path / "gsm8k"
    (folder / "main").mkdir(parents=True)
    for split, total in (("test", 4), ("train", 5)):
        (folder / "main" / f"{split}.jsonl").write_text(json.dumps({"question": "How many?", "answer": f"#### {total}"}) + "\n")
    files = "\n".join(f"  - split: {split}\n    path: main/{split}.jsonl" for split in ("test", "train"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  data_files:\n{files}\n---\n")
    assert [e.expected for e in load(find("gsm8k"), str(folder))] == ["4"]
    assert [e.expected for e in load(find("gsm8k"), str(folder), split="train")] == ["5"]
    with pytest.raises(UserError, match="`datasets` could not load it"):
        load(find("gsm8k"), str(folder), split="nothing")


@pytest.mark.parametrize(
    ("task", "records", "message"),
    [
        (
            "gsm8k",
            [{"instruction": "a", "output": "b", "answer": "1"}, {"instruction": "a", "output": "b"}],
            "record 1 has no `answer`",
        ),
        ("gsm8k", [{"instruction": "a", "answer": "one"}], "record 0: its answer is no number: 'one'"),
        ("gsm8k", [{"question": "a", "answer": "4"}], "record 0: its answer has no '#### N'"),
        ("gsm8k", [{"instruction": " ", "answer": "1"}], "record 0 asks nothing: its prompt is empty"),
        ("gsm8k", [{"text": "a"}], "record 0 has no 'instruction'"),
        ("gsm8k", ["a"], "record 0: expected an object, got str"),
        ("gsm8k", [], "holds no records"),
        (
            "hellaswag-generated",
            [{"instruction": "a", "answer": "answer1"}],
            "its answer is 'answer1': expected one of ending1",
        ),
        ("hellaswag-generated", [{"ctx": "a", "endings": ["b"], "label": 0}], r"no 'instruction' \(it has ctx, endings, label\); "),
        ("boolq-generated", [{"question": "a", "answer": True}], r"record 0 has no 'instruction' \(it has question, answer\)"),
        *(("boolq-generated", [{"instruction": "a", "answer": odd}], "its answer is .*: expected one of true") for odd in (-1, "yes")),
        ("gsm8k", [{"instruction": None, "answer": "1"}], "record 0: no text under 'instruction', but null"),
        ("gsm8k", [{"instruction": "a", "answer": "9" * 400}], "record 0: its answer is a number beyond"),
        ("gsm8k", [{"instruction": "a", "input": 3, "answer": "1"}], "record 0: no text under 'input', but a number"),
        ("gsm8k", [{"instruction": "a", "answer": [1]}], "record 0: no text under 'answer', but a list"),
        ("gsm8k", [{"instruction": "a", "answer": 0}, {"instruction": "\u200b", "answer": 0}], "record 1 asks nothing"),
        ("gsm8k", [{"question": 7, "answer": "#### 1"}], "record 0: no text under 'question', but a number"),
        ("gsm8k", [{"question": "a\ud83d", "answer": "#### 1"}], r"record 0: 'question' holds half of a surrogate pair"),
    ],
)
def test_bad_files(task, records, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load(find(task), written(tmp_path, *records))


def test_bad_sources(tmp_path):
    task = find("gsm8k")
    with pytest.raises(UserError, match=r"nowhere\.json does not exist"):
        load(task, "nowhere.json")
    with pytest.raises(UserError, match=r"https://localhost:1/a\.json: the download failed"):
        load(task, "https://localhost:1/a.json")
    with pytest.raises(UserError, match="a file has no splits"):
        load(task, written(tmp_path, {"instruction": "a", "answer": "1"}), split="test")
    with pytest.raises(UserError, match="limit = 0"):
        load(task, written(tmp_path, {"instruction": "a", "answer": "1"}), limit=0)


REAL = SHARED / "data"


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the shared data sets")
def test_the_real_files():
    assert len(load(find("gsm8k"), str(REAL / "gsm8k_test.json"))) == 1319
    assert len(load(find("hellaswag-generated"), str(REAL / "hellaswag_test_500_rebuilt.json"))) == 500
