"""configs/my_chat.yaml, the one config that a user edits: as it stands, and with a file of one's own and a model that is here."""

import json

from support import ROOT

from moejax import cli

CONFIG = str(ROOT / "configs/my_chat.yaml")


def test_as_it_stands_a_dry_run_needs_no_network(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.train_main(["--config", CONFIG, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "30,532,122,624" in out and "not there: data.source = my_chats.jsonl" in out
    (tmp_path / "mine.csv").write_text("question,answer\nWhy?,Because.\n")
    assert cli.train_main(["--config", CONFIG, "--dry-run", "data.source=mine.csv"]) == 0
    assert "data: 1 records to train on" in capsys.readouterr().out


def test_a_file_and_a_model_are_all(capsys, tmp_path):
    """A file of chats. Where the model has no chat template of its own, a form by name."""
    data = tmp_path / "mine.jsonl"
    talks = ([("user", f"{n} + 1?"), ("assistant", f"{n + 1}"), ("user", "And 2?"), ("assistant", f"{n + 2}")] for n in range(20))
    records = ({"messages": [{"role": role, "content": text} for role, text in talk]} for talk in talks)
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    model = ["model.source=" + str(ROOT / "assets/tiny-qwen3-moe"), "model.preset=null", "data.template=mistral"]
    small = ["data.row_tokens=64", "data.max_length=64", "training.epochs=1", f"runs_dir={tmp_path}/runs"]
    assert cli.train_main(["--config", CONFIG, f"data.source={data}", *model, *small]) == 0
    out = capsys.readouterr().out
    assert "\u27e61</s>\u27e7[INST] And 2? [/INST]\u27e62</s>\u27e7" in out
    assert (tmp_path / "runs/my_chat/adapter/adapter_model.safetensors").is_file()
