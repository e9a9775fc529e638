"""`moejax generate` on a finished run."""

import io
import json
import shutil

import numpy as np
import pytest
from support import ROOT, finished_run

from moejax import cli
from moejax.data.ends import Ends
from moejax.data.templates import render
from moejax.evaluation.generate import Answers, generate
from moejax.runs.open import load

QUESTION = "Tom has 4 apples and buys 5. How many has he?"


@pytest.fixture(scope="module")
def expected(run):
    """The whole greedy answer, by the run's tuned model."""
    make, _, tokenizer, template, _ = load(run)
    prompt = render(template, {"instruction": QUESTION, "input": "", "output": ""}, tokenizer)[0]
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    (tokens,) = generate(make(), [ids], max_new_tokens=12, end=tokenizer.eos_token_id)
    return prompt, tokenizer.decode(tokens, skip_special_tokens=True)


def test_one_prompt(run, expected, capsys):
    prompt, answer = expected
    for asked in (["--prompt", prompt], ["--instruction", QUESTION]):
        assert cli.main(["generate", str(run), *asked, "--max-new-tokens", "12"]) == 0
        out, err = capsys.readouterr()
        assert out == answer + "\n"
        assert "tokens/s" in err and len(err.splitlines()) == 1


def test_a_conversation_is_asked_as_training_renders_it(run, expected, tmp_path, capsys, monkeypatch):
    """A single question as --instruction asks it, from a file or standard input; more turns as the API has them."""
    path, talk = tmp_path / "a.json", [{"role": "user", "content": QUESTION}]
    path.write_text(json.dumps(talk))
    for given in (str(path), "-"):
        monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps({"messages": talk})))
        assert cli.main(["generate", str(run), "--messages", given, "--max-new-tokens", "12"]) == 0
        assert capsys.readouterr().out == expected[1] + "\n"
    talk += [{"role": "assistant", "content": "9"}, {"role": "user", "content": "Sure?"}]
    path.write_text(json.dumps({"conversations": talk}))
    assert cli.main(["generate", str(run), "--messages", str(path), "--max-new-tokens", "12"]) == 0
    make, _, tokenizer, template, _ = load(run)
    assert template == "mistral"
    ids = tokenizer.encode(f"[INST] {QUESTION} [/INST]9</s>[INST] Sure? [/INST]", add_special_tokens=False)
    (tokens,) = generate(make(), [ids], max_new_tokens=12, end=tokenizer.eos_token_id)
    assert capsys.readouterr().out == tokenizer.decode(tokens, skip_special_tokens=True) + "\n"


def test_a_models_folder_is_asked_by_its_chat_template(tmp_path):
    folder = tmp_path / "merged"
    shutil.copytree(ROOT / "assets/tiny-mixtral", folder)
    assert load(folder).template == "mistral"
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    turns = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": turns}))
    assert load(folder).template == "chat"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('[{"role": "assistant", "content": "a"}]', "whose last message is to be answered, not an assistant's"),
        ('[{"role": "user"', "no JSON"),
        ('"a"', "expected a list of messages, or an object that has it under messages, got 'a'"),
        ('[{"role": "narrator", "content": "a"}]', "message 0: the role 'narrator' is unknown"),
        ('[{"role": "user", "content": "\\ud800"}]', "half of a surrogate pair"),
        (None, "No such file"),
    ],
)
def test_a_conversation_that_cannot_be_answered(content, told, run, tmp_path, capsys):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    assert cli.main(["generate", str(run), "--messages", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and f"--messages {path}" in err and told in err and "Traceback" not in err


def test_stop(run, expected, capsys):
    prompt, answer = expected
    stop = answer[5:8]
    assert cli.main(["generate", str(run), "--prompt", prompt, "--max-new-tokens", "12", "--stop", stop]) == 0
    assert capsys.readouterr().out == answer[: answer.index(stop)] + "\n"


def test_several_sampled(run, capsys):
    drawn = ["--temperature", "1.5", "--top-k", "50", "--top-p", "0.99", "--max-new-tokens", "9"]
    asked = ["--prompt", "[INST] 1 + 1 [/INST]", "--prompt", "Why"]
    outputs = []
    for seed in ("1", "1", "2"):
        assert cli.main(["generate", str(run), *asked, *drawn, "--seed", seed]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    assert outputs[0].startswith("--- [INST] 1 + 1 [/INST]\n") and "\n--- Why\n" in outputs[0]


def test_what_is_not_certain_yet_is_not_shown():
    """A beginning stop string, and a character of which bytes are missing."""

    class Characters:
        def decode(self, tokens, skip_special_tokens):
            return bytes(tokens).decode("utf-8", errors="replace")

    answers, printed, shown = Answers(Characters(), ["END"], 1, Ends((0,))), 0, []
    for byte in "é EN END more".encode():
        answers.add(np.array([[byte]]))
        shown.append(answers.certain(printed))
        printed += len(shown[-1])
    assert shown[:6] == ["", "é", " ", "", "", "EN "] and "".join(shown) == "é EN "
    assert answers.finished()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "an empty prompt"),
        (["--prompt", "a", "--prompt", " "], "an empty prompt"),
        (["--prompt", "a", "--temperature", "-1"], "temperature = -1.0"),
        (["--prompt", "a", "--top-p", "0"], "top_p = 0.0"),
        (["--prompt", "a", "--top-k", "0"], "top_k = 0"),
        (["--prompt", "a", "--stop", ""], "--stop ''"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["--prompt", "a " * 5000], "positions: shorten the prompt"),
    ],
)
def test_bad_input(arguments, message, run, capsys):
    assert cli.main(["generate", str(run), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and "Traceback" not in err and len(err.strip().splitlines()) == 1


def test_bad_runs(run, tmp_path, capsys):
    assert cli.main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert "is not a finished run" in capsys.readouterr().err
    content = json.loads((ROOT / "assets/tiny-mixtral/tokenizer.json").read_text())
    text = json.dumps(content).replace('"</s>"', '"<stop>"')
    (tmp_path / "tokenizer.json").write_text(text)
    finished_run(tmp_path / "endless", tokenizer=str(tmp_path / "tokenizer.json"))
    assert cli.main(["generate", str(tmp_path / "endless"), "--prompt", "a"]) == 2
    assert "names no end-of-sequence token" in capsys.readouterr().err
    finished_run(tmp_path / "text", data={"source": str(ROOT / "assets/problems/train.json"), "template": "text"})
    assert cli.main(["generate", str(tmp_path / "text"), "--instruction", "a"]) == 2
    assert "use --prompt" in capsys.readouterr().err
