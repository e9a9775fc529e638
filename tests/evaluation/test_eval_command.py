"""`moejax eval` on runs, their bases and models' folders; `moejax generate` on a BlackMamba."""

import argparse
import json
import shutil

import pytest
from support import ROOT, finished_run

from moejax import cli
from moejax.commands import eval as eval_command
from moejax.data.templates import render
from moejax.errors import UserError
from moejax.evaluation import evaluate as evaluation
from moejax.evaluation.evaluate import evaluate
from moejax.evaluation.generate import generate
from moejax.evaluation.tasks import find
from moejax.evaluation.tasks import load as load_examples
from moejax.hub.save import save_weights
from moejax.runs.open import load

PROBLEMS = str(ROOT / "assets/problems/test.json")


@pytest.fixture(scope="module")
def trained_whole(tmp_path_factory):
    """A run without adapter: a BlackMamba whose weights were all trained (the bundled ones, the last norm doubled)."""
    folder = tmp_path_factory.mktemp("runs") / "blackmamba"
    model = {"source": str(ROOT / "assets/tiny-blackmamba")}
    finished_run(folder, model=model, adapter=None, quantization={"format": "none"})
    make, *_ = load(ROOT / "assets/tiny-blackmamba")
    model = make()
    model.norm.weight.set_value(2 * model.norm.weight.get_value())
    save_weights(model, folder / "model")
    return folder


def kept(folder):
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return json.loads((folder / "result.json").read_text()), [json.loads(line) for line in lines]


def test_a_run_and_its_base(run, capsys):
    """The command's figures are evaluate's, with the adapter and without."""
    task = find("problems")
    outputs = []
    for base in (False, True):
        arguments = [
            "eval",
            str(run),
            "--task",
            "problems",
            "--data",
            PROBLEMS,
            "--limit",
            "5",
            "--rows",
            "4",
            "--max-new-tokens",
            "12",
        ]
        assert cli.main(arguments + ["--base"] * base) == 0
        result, predictions = kept(run / "eval" / ("problems-base" if base else "problems"))
        make, _, tokenizer, template, _ = load(run, base)
        expected = evaluate(
            make(), tokenizer, task, load_examples(task, PROBLEMS, limit=5), max_new_tokens=12, rows=4, template=template
        )
        assert predictions == expected.predictions
        assert (result["task"], result["n"], result["correct"]) == ("problems", 5, expected.correct)
        out = capsys.readouterr().out
        low, high = 100 * result["low"], 100 * result["high"]
        name = "problems (base)" if base else "problems"
        assert out.startswith(f"{name}: {100 * result['accuracy']:.1f} % right ({result['correct']} of 5)")
        assert f"95 % interval {low:.1f} to {high:.1f} %" in out and "tokens/s" in out and task.rule in out
        outputs.append([p["output"] for p in predictions])
    assert outputs[0] != outputs[1]


def test_a_run_without_adapter(trained_whole, tmp_path, capsys):
    """Full fine-tuning: its own weights, and with --base those it began with; a folder of choice."""
    task = ["--task", "problems", "--data", PROBLEMS, "--limit", "3", "--max-new-tokens", "4"]
    run = shutil.copytree(trained_whole, tmp_path / "run")
    model = load(run).make()
    model.norm.weight.set_value(-model.norm.weight.get_value())  # of the likeliest token the unlikeliest
    save_weights(model, run / "model")
    folders = [run / "eval/problems", tmp_path / "base", tmp_path / "bundled"]
    assert cli.main(["eval", str(run), *task]) == 0
    assert cli.main(["eval", str(run), *task, "--base", "--out", str(folders[1])]) == 0
    assert cli.main(["eval", str(ROOT / "assets/tiny-blackmamba"), *task, "--out", str(folders[2])]) == 0
    own, base, bundled = ([p["output"] for p in kept(folder)[1]] for folder in folders)
    assert own != base == bundled


def test_a_models_folder(tmp_path, capsys):
    arguments = ["eval", str(ROOT / "assets/tiny-mixtral"), "--task", "gsm8k-strict", "--data", PROBLEMS, "--limit", "2"]
    assert cli.main([*arguments, "--max-new-tokens", "4", "--out", str(tmp_path / "out")]) == 0
    assert kept(tmp_path / "out")[0]["task"] == "gsm8k-strict" and capsys.readouterr().out.startswith("gsm8k-strict: ")
    assert not (ROOT / "assets/tiny-mixtral/eval").exists()


def test_a_full_disk_does_not_cost_the_result(tmp_path, capsys, monkeypatch):
    def full(result, folder):
        raise UserError(f"{folder}: no room")

    monkeypatch.setattr(evaluation, "write", full)
    arguments = ["eval", str(ROOT / "assets/tiny-mixtral"), "--task", "gsm8k-strict", "--data", PROBLEMS, "--limit", "2"]
    assert cli.main([*arguments, "--max-new-tokens", "4", "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("gsm8k-strict: ") and "predictions.jsonl" not in out and "no room" in err


def bad(arguments, capsys):
    capsys.readouterr()
    assert cli.main(["eval", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err and len(err.strip().splitlines()) == 1
    return err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--task": "gsm8"}, "unknown task 'gsm8': did you mean gsm8k"),
        ({"--task": "hellaswag"}, "did you mean hellaswag-generated?"),
        ({"--data": "nowhere.json"}, "data file nowhere.json does not exist"),
        ({"--task": "piqa-generated"}, "record 0: its answer is '77': expected one of solution1, solution2"),
        ({"--limit": "0"}, "--limit 0: expected 1 or more"),
        ({"--rows": "0"}, "--rows 0"),
        ({"--max-new-tokens": "0"}, "--max-new-tokens 0"),
        (
            {"--max-new-tokens": "2048"},
            "tokens and 2048 new ones exceed the model's 2048 positions: shorten the prompt or ask",
        ),
        ({"--split": "test"}, "a file has no splits"),
        ({"--out": __file__}, "is a file: expected a folder"),
        ({"--out": f"{__file__}/x"}, "Not a directory: the answers could not be kept there"),
    ],
)
def test_bad_options(changes, message, run, capsys):
    options = {"--task": "problems", "--data": PROBLEMS} | changes
    assert message in bad([run, *(part for pair in options.items() for part in pair)], capsys)


def test_bad_data(run, tmp_path, capsys):
    for records, message in (
        ([{"instruction": "How many?", "output": "3"}], "record 0 has no `answer`"),
        ([{"instruction": " ", "answer": "3"}], "its prompt is empty"),
    ):
        (tmp_path / "data.json").write_text(json.dumps(records))
        assert message in bad([run, "--task", "gsm8k", "--data", tmp_path / "data.json"], capsys)
    assert not (run / "eval/gsm8k").exists()


def test_bad_runs(run, trained_whole, tmp_path, capsys):
    asked = ["--task", "problems", "--data", PROBLEMS]
    assert "nowhere is no folder" in bad(["nowhere", *asked], capsys)
    assert "is not a finished run" in bad([tmp_path, *asked, "--out", tmp_path / "x"], capsys)
    assert "give --out DIR" in bad([ROOT / "assets/tiny-mixtral", *asked], capsys)
    assert "there is no adapter to leave out" in bad(
        [ROOT / "assets/tiny-mixtral", *asked, "--base", "--out", tmp_path / "x"], capsys
    )
    overrides = {"vocab_size": 512, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
    random = {"model": {"preset": "mixtral-tiny", "overrides": overrides}, "adapter": None, "quantization": {"format": "none"}}
    finished_run(tmp_path / "random", tokenizer=str(ROOT / "assets/tiny-mixtral/tokenizer.json"), **random)
    (tmp_path / "random/model").mkdir()
    assert "a run without adapter and without model.source" in bad([tmp_path / "random", *asked, "--base"], capsys)
    shutil.copytree(run, tmp_path / "stopped")
    (tmp_path / "stopped/adapter").rename(tmp_path / "stopped/model")
    assert "its config has an adapter, and there is no adapter/ in it" in bad([tmp_path / "stopped", *asked], capsys)
    text = (ROOT / "assets/tiny-mixtral/tokenizer.json").read_text().replace('"</s>"', '"<stop>"')
    (tmp_path / "tokenizer.json").write_text(text)
    finished_run(tmp_path / "endless", tokenizer=str(tmp_path / "tokenizer.json"))
    assert "names no end-of-sequence token" in bad([tmp_path / "endless", *asked], capsys)


def test_a_blackmamba_answers(trained_whole, capsys):
    """`moejax generate` on a run of full fine-tuning and on a model's folder: what `generate` says, in the template."""
    make, _, tokenizer, template, _ = load(trained_whole)
    question = "Tom has 4 apples. Ana has 5 more. How many apples does Ana have?"
    prompt = render(template, {"instruction": question, "input": "", "output": ""}, tokenizer)[0]
    (tokens,) = generate(
        make(), [tokenizer.encode(prompt, add_special_tokens=False)], max_new_tokens=24, end=tokenizer.eos_token_id
    )
    expected = tokenizer.decode(tokens, skip_special_tokens=True)
    assert "First" in expected
    for asked in (["--instruction", question], ["--prompt", prompt]):
        assert cli.main(["generate", str(trained_whole), *asked, "--max-new-tokens", "24"]) == 0
        assert capsys.readouterr().out == expected + "\n"
    assert (
        cli.main(
            ["generate", str(ROOT / "assets/tiny-blackmamba"), "--instruction", question, "--max-new-tokens", "24"]
        )
        == 0
    )
    assert capsys.readouterr().out.startswith("First ")


def test_a_look_at_a_few_keeps_the_result_over_more(tmp_path):
    (tmp_path / "config.yaml").touch()
    folder = tmp_path / "eval/problems"
    folder.mkdir(parents=True)

    def out(count, limit, base=False):
        return eval_command._out(tmp_path, "problems", argparse.Namespace(out=None, base=base, limit=limit), count)

    assert out(5, 5) == folder
    (folder / "result.json").write_text('{"n": 40}')
    assert out(5, 5) == tmp_path / "eval/problems-first-5"
    assert out(50, 50) == out(40, 40) == out(5, None) == folder and out(5, 5, base=True) == tmp_path / "eval/problems-base"
