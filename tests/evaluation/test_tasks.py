"""Tasks: their names and rules, and their examples from files and from `datasets`, in both forms."""

import json

import pytest
from support import ROOT, SHARED

from moejax.errors import UserError
from moejax.evaluation.choices import SETS
from moejax.evaluation.tasks import TASKS, find, load

# LLM-Adapters' text, the set's own columns, and what a log-likelihood rule compares, of one made-up question each.
TEXTS = {
    "hellaswag": (
        "Please choose the correct ending to complete the given sentence: Baking: She takes the bread out. She\n\n"
        "Ending1: eats it. Ending2: sings to it. Ending3: sells it. Ending4: flies off.\n\n"
        "Answer format: ending1/ending2/ending3/ending4",
        {"activity_label": "Baking", "ctx_a": "She takes the bread out.", "ctx_b": "she", "ctx": "She takes the bread out. she",
         "endings": ["eats it.", "sings to it.", "sells it.", "flies off."], "label": "2"},
        "ending3",
        [("Baking: She takes the bread out. She", f" {e}") for e in ("eats it.", "sings to it.", "sells it.", "flies off.")],
    ),
    "boolq": (
        "Please answer the following question with true or false, question: is the sea salty?\n\nAnswer format: true/false",
        {"question": "is the sea salty", "answer": True},
        "true",
        [("Question: is the sea salty?\nAnswer:", " yes"), ("Question: is the sea salty?\nAnswer:", " no")],
    ),
    "piqa": (
        "Please choose the correct solution to the question: dry a cup\n\nSolution1: use a towel\n\nSolution2: use a lake\n\n"
        "Answer format: solution1/solution2",
        {"goal": "dry a cup", "sol1": "use a towel", "sol2": "use a lake", "label": 0},
        "solution1",
        [("Question: dry a cup\nAnswer:", " use a towel"), ("Question: dry a cup\nAnswer:", " use a lake")],
    ),
    "siqa": (
        "Please choose the correct answer to the question: Ana ate. Why?\n\nAnswer1: joy Answer2: hunger Answer3: rain\n\n"
        "Answer format: answer1/answer2/answer3",
        {"context": "Ana ate.", "question": "Why?", "answerA": "joy", "answerB": "hunger", "answerC": "rain", "label": "2"},
        "answer2",
        [("Q: Ana ate. Why?\nA:", f" {a}") for a in ("joy", "hunger", "rain")],
    ),
    "winogrande": (
        "Please choose the correct answer to fill in the blank to complete the given sentence: The cup broke the plate as _ was hard."
        "\n\nOption1: cup Option2: plate Answer format: option1/option2",
        {"sentence": "The cup broke the plate as _ was hard.", "option1": "cup", "option2": "plate", "answer": "1"},
        "option1",
        [("The cup broke the plate as cup", " was hard."), ("The cup broke the plate as plate", " was hard.")],
    ),
    "arc-easy": (
        "Please choose the correct answer to the question: What melts?\n\nAnswer1: ice Answer2: fire Answer3: air Answer4: iron\n\n"
        "Answer format: answer1/answer2/answer3/answer4",
        {"question": "What melts?", "choices": {"text": ["ice", "fire", "air", "iron"], "label": ["1", "2", "3", "4"]}, "answerKey": "1"},
        "answer1",
        [("Question: What melts?\nAnswer:", f" {a}") for a in ("ice", "fire", "air", "iron")],
    ),
    "arc-challenge": (
        "Please choose the correct answer to the question: What melts?\n\nAnswer1: ice Answer2: fire Answer3: air\n\n"
        "Answer format: answer1/answer2/answer3",
        {"question": "What melts?", "choices": {"text": ["ice", "fire", "air"], "label": ["A", "B", "C"]}, "answerKey": "C"},
        "answer3",
        [("Question: What melts?\nAnswer:", f" {a}") for a in ("ice", "fire", "air")],
    ),
    "openbookqa": (
        "Please choose the correct answer to the question: Rain is\n\nAnswer1: wet Answer2: dry\n\nAnswer format: answer1/answer2",
        {"question_stem": "Rain is", "choices": {"text": ["wet", "dry"], "label": ["A", "B"]}, "answerKey": "A"},
        "answer1",
        [("Rain is", " wet"), ("Rain is", " dry")],
    ),
}  # fmt: skip


def written(tmp_path, *records, name="data.json"):
    path = tmp_path / name
    path.write_text(json.dumps(list(records)))
    return str(path)


def test_names():
    methods = ("generated", "loglikelihood", "loglikelihood-normalized")
    assert set(TASKS) == {"gsm8k", "gsm8k-strict", "problems"} | {f"{s}-{m}" for s in SETS for m in methods}
    assert set(TEXTS) == set(SETS)
    assert all(find(name).name == name for name in TASKS)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("gsm8", "gsm8k"),
        ("hellaswag", "hellaswag-generated, hellaswag-loglikelihood"),
        ("winogrnde-generated", "winogrande-generated"),
    ],
)
def test_an_unknown_task_names_the_nearest(name, near):
    with pytest.raises(UserError, match=f"unknown task '{name}': did you mean .*{near}"):
        find(name)
    with pytest.raises(UserError, match="unknown task 'zzzz': there are gsm8k, "):
        find("zzzz")


@pytest.mark.parametrize("name", TEXTS)
def test_both_forms_of_a_choice(name, tmp_path):
    """The set's own columns give LLM-Adapters' text, and that text the same candidates."""
    text, columns, expected, candidates = TEXTS[name]
    record = {"instruction": text, "input": "", "output": f"the correct answer is {expected}", "answer": expected}
    source = written(tmp_path, record, columns)
    for example in load(find(f"{name}-generated"), source):
        assert example.record == {"instruction": text, "input": "", "output": f"the correct answer is {expected}"}
        assert (example.expected, example.candidates) == (expected, ())
    for method in ("loglikelihood", "loglikelihood-normalized"):
        for example in load(find(f"{name}-{method}"), source):
            assert (example.expected, list(example.candidates)) == (expected, candidates)
            assert example.names[: len(candidates)] == SETS[name].words[: len(candidates)]


def test_boolq_with_its_passage(tmp_path):
    record = {"question": "is it", "answer": False, "passage": "It is not."}
    (example,) = load(find("boolq-loglikelihood"), written(tmp_path, record))
    assert example.expected == "false"
    assert example.candidates[1] == ("It is not.\nQuestion: is it?\nAnswer:", " no")


def test_hellaswags_marks_are_taken_out(tmp_path):
    record = {
        "activity_label": "Home",
        "ctx": "How to sit [title] Take a chair. [step] It",
        "endings": ["stands. [substeps] Sit.", "a", "b", "c"],
    }
    (example,) = load(find("hellaswag-loglikelihood"), written(tmp_path, record | {"label": 0}))
    assert example.candidates[0] == ("Home: How to sit. Take a chair. It", " stands. Sit.")


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
        ("hellaswag-loglikelihood", [{"instruction": "a", "answer": "ending1"}], "its instruction does not begin with"),
        ("hellaswag-loglikelihood", [{"ctx": "a", "endings": ["b"], "label": ""}], "its label is ''"),
        ("hellaswag-loglikelihood", [{"ctx": "a", "label": 0}], "has no 'endings'"),
        *(
            ("boolq-generated", [{"question": "a", "answer": missing}], "record 0: its answer is .*: expected true or false")
            for missing in ("", -1, "yes")
        ),
        ("boolq-generated", [{"question": "a", "answer": None}], "record 0: no text under 'answer', but null"),
        ("gsm8k", [{"instruction": None, "answer": "1"}], "record 0: no text under 'instruction', but null"),
        ("gsm8k", [{"instruction": "a", "answer": "9" * 400}], "record 0: its answer is a number beyond"),
        *(
            (
                "winogrande-loglikelihood",
                [{"sentence": "a _", "option1": "b", "option2": "c", "answer": odd}],
                f"record 0: its answer is {odd!r}: expected the number of an answer",
            )
            for odd in (float("inf"), 1.5, True, "1.5")
        ),
        ("gsm8k", [{"instruction": "a", "input": 3, "answer": "1"}], "record 0: no text under 'input', but a number"),
        ("gsm8k", [{"instruction": "a", "answer": [1]}], "record 0: no text under 'answer', but a list"),
        ("gsm8k", [{"instruction": "a", "answer": 0}, {"instruction": "\u200b", "answer": 0}], "record 1 asks nothing"),
        ("gsm8k", [{"question": 7, "answer": "#### 1"}], "record 0: no text under 'question', but a number"),
        ("gsm8k", [{"question": "a\ud83d", "answer": "#### 1"}], r"record 0: 'question' holds half of a surrogate pair"),
        ("piqa-loglikelihood", [{"goal": None, "sol1": "a", "sol2": "b", "label": 0}], "no text under 'goal', but null"),
        ("piqa-loglikelihood", [{"goal": "g", "sol1": 1, "sol2": "b", "label": 0}], "no text under 'sol1', but a number"),
        ("hellaswag-loglikelihood", [{"ctx": "a", "endings": ["b", None], "label": 0}], "'endings' is no list of texts"),
        ("hellaswag-loglikelihood", [{"ctx": "a", "endings": ["b", "\udc00"], "label": 0}], "record 0 holds half of a surrogate pair"),
        (
            "arc-easy-generated",
            [{"question": "a", "choices": {"text": "b", "label": ["A"]}, "answerKey": "A"}],
            "'choices.text' is no list of texts",
        ),
        (
            "hellaswag-loglikelihood",
            [{"ctx": "a", "endings": ["b"], "label": 3}],
            "it has 1 answer, and the right one is number 4",
        ),
        (
            "piqa-loglikelihood",
            [{"instruction": SETS["piqa"].head + "a", "answer": "solution1"}],
            "its instruction has no Solution1:",
        ),
        (
            "arc-easy-generated",
            [{"question": "a", "choices": {"text": ["b"], "label": ["A"]}, "answerKey": "B"}],
            "'B' is not in list",
        ),
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
    for method in ("generated", "loglikelihood"):
        examples = load(find(f"hellaswag-{method}"), str(REAL / "hellaswag_test_500_rebuilt.json"))
        assert len(examples) == 500
    assert all(len(e.candidates) == 4 and all(len(text) > 2 for _, text in e.candidates) for e in examples)
    heads = {s.head: name for name, s in SETS.items() if name not in ("arc-easy", "arc-challenge", "openbookqa", "siqa")}
    mixture = json.loads((REAL / "commonsense_1000_rebuilt.json").read_text())
    read = 0
    for head, name in heads.items():
        for record in mixture:
            if record["instruction"].startswith(head):
                question = SETS[name].parsed(record)
                assert SETS[name].instruction(question).split() == record["instruction"].split()
                read += 1
    assert read == 530
