"""`moejax data`: what a run would train on, without jax, weights or a file written."""

import json
import subprocess
import sys

import pytest
from support import ROOT

from moejax import cli

RECORDS = [{"question": f"{n} and 1?", "answer": f"It is {n + 1}."} for n in range(5)]


@pytest.fixture
def arguments(tmp_path):
    """A config whose model has no weights: only its tokenizer's files and sizes."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((ROOT / "assets/tiny-mixtral" / name).read_bytes())
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in [*RECORDS, RECORDS[0]]))
    return ["data", str(ROOT / "configs/demo.yaml"), f"model.source={folder}", f"data.source={data}", "data.holdout=1"]


def test_counts_columns_and_examples(arguments, capsys):
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "(by name; data.fields names others)" in out and "query 1 of 5" in out and "query 5 of 5" in out
    assert "[INST] 0 and 1? [/INST]\u27e6It is 1.</s>\u27e7" in out


def test_as_json(arguments, capsys):
    assert cli.main([*arguments, "data.holdout=0", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    counts = document["statistics"]
    assert (counts["records"], counts["duplicate"], counts["queries"], counts["blank answers"]) == (6, 1, 6, 0)
    assert document["sources"][0]["longest"] == counts["longest"]
    assert document["examples"][0]["parts"][1] == {"text": "It is 1.</s>", "trained": True}


def test_no_jax_is_imported_and_nothing_is_written(arguments, tmp_path):
    program = (
        "import sys\nfrom moejax import cli\nassert cli.main(sys.argv[1:]) == 0\n"
        "assert not {'jax', 'flax', 'torch'} & sys.modules.keys(), 'imported'\n"
    )
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["data.source=null", "data.batching=fixed"], "data.source is null: the run trains on random tokens"),
        (["model.source=nobody/nothing"], "nobody/nothing"),
    ],
)
def test_what_cannot_be_shown(arguments, changes, told, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert cli.main([*arguments, *changes]) == 2
    assert told in capsys.readouterr().err
