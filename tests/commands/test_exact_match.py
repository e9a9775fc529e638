"""`moejax exact-match` on a finished run."""

import json

import jax
import jax.numpy as jnp
import pytest
from support import ROOT, finished_run

from moejax import cli, config
from moejax.hub.save import save_weights
from moejax.models.build import build
from moejax.models.config import PRESETS


@pytest.fixture
def run(tmp_path):
    """A run on a base of random weights."""
    model = build(
        PRESETS["mixtral-tiny"].replace(
            hidden_size=32, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16
        ),
        key=jax.random.key(0),
    )
    save_weights(model, tmp_path / "base", jnp.float32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / name).write_text((ROOT / "assets/tiny-mixtral" / name).read_text())
    problems = json.loads((ROOT / "assets/problems/train.json").read_text())[:30]
    problems[0]["instruction"] += " [/b]"  # no markup, whatever is printed of it
    (tmp_path / "train.json").write_text(json.dumps(problems))
    data = {"source": str(tmp_path / "train.json"), "row_tokens": 64, "max_length": 64, "batch_rows": 4}
    content = {"quantization": {"format": "none"}, "data": data, "training": {"steps": 2, "compute_dtype": "float32"}}
    finished_run(tmp_path / "runs/run", model={"source": str(tmp_path / "base")}, **content)
    return tmp_path / "runs" / "run", tmp_path / "train.json"


def test_scores_and_predictions(run, capsys):
    folder, data = run
    (data.parent / "numbers.json").write_text(
        json.dumps([r | {"answer": i} for i, r in enumerate(json.loads(data.read_text()))])  # numbers, the first of them 0
    )
    assert cli.main(["exact-match", str(folder), "--data", str(data.parent / "numbers.json"), "--limit", "5"]) == 0
    result = json.loads((folder / "exact_match.json").read_text())
    assert result["problems"] == 5 and set(result["accuracy"]) >= {"base", "tuned"}
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [line["model"] for line in lines] == ["base"] * 5 + ["tuned"] * 5
    assert sum(line["correct"] for line in lines[:5]) / 5 == result["accuracy"]["base"]
    assert "tuned" in capsys.readouterr().out
    assert cli.main(["exact-match", str(folder), "--data", str(data), "--limit", "2"]) == 0  # a look at fewer replaces nothing
    assert json.loads((folder / "exact_match.json").read_text()) == result
    assert json.loads((folder / "exact_match-first-2.json").read_text())["problems"] == 2
    assert len((folder / "predictions.jsonl").read_text().splitlines()) == 10
    assert len((folder / "predictions-first-2.jsonl").read_text().splitlines()) == 4


@pytest.mark.long
def test_a_run_that_trained_all_weights(run, tmp_path, capsys):
    """Its tuned model is the one in model/, not the base again. What is stored how is said where a run begins, not before answers."""
    folder, data = run
    content = config.load(folder / "config.yaml").model_dump(mode="json")
    content |= {"name": "full", "adapter": None}
    content["training"]["learning_rate"] = 0.05
    path = tmp_path / "full.yaml"
    path.write_text(config.dump(config.Experiment.model_validate(content)))
    assert cli.main(["train", "--config", str(path)]) == 0
    assert "\nexperts: 24.6 k parameters, float32, " in capsys.readouterr().out
    assert cli.main(["exact-match", str(tmp_path / "runs/full"), "--data", str(data), "--limit", "3"]) == 0
    assert not [text for text in capsys.readouterr() if " parameters, " in text]
    lines = [json.loads(line) for line in (tmp_path / "runs/full/predictions.jsonl").read_text().splitlines()]
    assert [x["output"] for x in lines[:3]] != [x["output"] for x in lines[3:]]


def test_bad_input(run, tmp_path, capsys):
    folder, _ = run
    assert cli.main(["exact-match", str(tmp_path / "nowhere"), "--data", "x.json"]) == 2
    assert "is not a finished run" in capsys.readouterr().err
    (tmp_path / "open.json").write_text(json.dumps([{"instruction": "a", "output": "b"}]))
    assert cli.main(["exact-match", str(folder), "--data", str(tmp_path / "open.json")]) == 2
    assert "record 0 has no `answer`" in capsys.readouterr().err
    (tmp_path / "half.json").write_text('[{"instruction": "a \\ud83d", "output": "", "answer": "1"}]')
    assert cli.main(["exact-match", str(folder), "--data", str(tmp_path / "half.json")]) == 2
    assert "half.json, record 0: 'instruction' holds half of a surrogate pair" in capsys.readouterr().err
    assert cli.main(["exact-match", str(folder), "--data", str(tmp_path / "train.json"), "--limit", "0"]) == 2
    assert "--limit 0: expected 1 or more" in capsys.readouterr().err
