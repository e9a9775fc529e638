"""`moejax init`, and `moejax train CONFIG`."""

import json
import re
from pathlib import Path

import pytest
from support import ROOT

from moejax import cli, config
from moejax.commands import init, train  # train: here, so that no module takes the patched config.load for its own
from moejax.data.tokenizer import byte_tokenizer, load_tokenizer
from moejax.errors import UserError

STARTERS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if "my_data.jsonl" in path.read_text())


@pytest.mark.parametrize("starter", STARTERS, ids=lambda p: p.stem)
def test_a_config_that_comes_with_moejax_with_the_users_file_in_it(starter, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data, file = "my: records #1.jsonl", "folder/my run.yaml"
    assert cli.main(["init", file, "--model", starter.stem.replace("_", "-"), "--data", data]) == 0
    assert f"{data}, which is not there yet; look" in (printed := capsys.readouterr().out) and f"moejax data {file}" in printed
    written, shipped = config.load(file), config.load(starter)
    assert (written.name, written.data.source) == ("my_run", data)
    if (tmp_path / "folder/tokenizer.json").exists():
        assert written.tokenizer == "folder/tokenizer.json" and shipped.tokenizer == "tokenizer.json"
        load_tokenizer(written.tokenizer)
    as_shipped = {"name": shipped.name, "tokenizer": shipped.tokenizer}
    as_shipped["data"] = written.data.model_copy(update={"source": "my_data.jsonl"})
    assert written.model_copy(update=as_shipped) == shipped
    assert "  # " in (tmp_path / file).read_text()


def test_another_model_brings_its_sizes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local").mkdir()
    for file, model in (("hub.yaml", "acme/large"), ("local.yaml", "local")):
        assert cli.main(["init", file, "--model", model]) == 0
        written = config.load(file)
        assert (written.model.source, written.model.preset, written.quantization.format) == (model, None, "nf4")
        assert written.adapter == config.AdapterConfig() and written.data.template is None  # its family's targets, its tokenizer's template
    assert cli.main(["init"]) == 0 and config.load("finetune.yaml").model.preset == "mixtral-8x7b"


def test_a_small_file_gets_a_holdout_and_a_warmup_that_it_has_room_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    talk = {"messages": [{"role": "user", "content": "What is 2 plus 3?"}, {"role": "assistant", "content": "2 + 3 = 5."}]}
    data = tmp_path / "chats.jsonl"
    for count, expected in ((4, (0, 0, None)), (60, (6, 0, 1)), (20_000, (200, 20, 100))):
        data.write_text("".join(json.dumps(talk) + "\n" for _ in range(count)))
        assert cli.main(["init", f"{count}.yaml", "--model", str(ROOT / "assets/tiny-qwen3-moe"), "--data", data.name]) == 0
        written = config.load(f"{count}.yaml")
        assert (written.data.holdout, written.training.warmup_steps, written.training.eval_every) == expected
        fitted = r"\n# holdout, .*: chosen for about \d.* steps?, which chats.jsonl gives now.*\ntraining:"
        assert re.search(fitted, Path(f"{count}.yaml").read_text())
        assert written.data.template == "mistral"  # the bundled tokenizer has no chat template
    assert cli.main(["init", "hub.yaml", "--model", "acme/large", "--data", data.name]) == 0
    assert config.load("hub.yaml").data.template is None


def test_random_weights_with_a_users_file(tmp_path, monkeypatch):
    """A config without a model's source, holdout, warm-up or checkpoints takes none from the file."""
    monkeypatch.chdir(tmp_path)
    Path("mine.jsonl").write_text('{"instruction": "What is 2 plus 3?", "output": "5"}\n' * 40)
    assert cli.main(["init", "tiny.yaml", "--model", "mixtral_tiny", "--data", "mine.jsonl"]) == 0
    assert config.load("tiny.yaml").data.source == "mine.jsonl"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["there.yaml"], "there.yaml is there already"),
        (["new.yaml", "--model", "mixtral_tiny"], "tokenizer.json is there already"),
        (["new.yaml", "--model", "acme"], "a Hub id (with a /), a folder that exists, or one of blackmamba_2.8b, "),
        (["new.yaml", "--model", "qwen3-30b-a3b"], "; did you mean qwen3_30b_a3b_"),
    ],
)
def test_nothing_is_replaced_and_nothing_guessed(arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("there.yaml", "tokenizer.json"):
        (tmp_path / name).write_text("mine")
    assert cli.main(["init", *arguments]) == 2
    assert told in capsys.readouterr().err
    assert sorted((path.name, path.read_text()) for path in tmp_path.iterdir()) == [("there.yaml", "mine"), ("tokenizer.json", "mine")]


@pytest.mark.parametrize(
    ("content", "told"),
    [("", "mine.jsonl is empty"), ("[]", "mine.jsonl holds no records: expected one JSON object a line"),
     ('{"instruction": "a", "output": "b"}\n{"instr\n', "mine.jsonl, line 2: broken JSON"), ("hello", "it begins with 'hello'")],
)  # fmt: skip
def test_data_that_are_no_records_are_refused(content, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").write_text(content)
    assert cli.main(["init", "new/my.yaml", "--model", "mixtral_tiny", "--data", "mine.jsonl"]) == 2
    assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.jsonl"]


def test_columns_that_are_not_known_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").write_text('{"q": "a", "z": "b"}\n')
    assert cli.main(["init", "--model", "olmoe_1b_7b", "--data", "mine.jsonl"]) == 0
    assert "note: mine.jsonl, record 0: no columns of questions and answers" in capsys.readouterr().out
    assert config.load("finetune.yaml").data.source == "mine.jsonl"


@pytest.mark.parametrize("sides", [("chosen", "rejected"), ("preferred_output", "non_preferred_output")])
def test_pairs_of_answers_name_the_section_that_trains_on_them(sides, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.jsonl").write_text(json.dumps({"prompt": "a", sides[0]: "b", sides[1]: "c"}) + "\n")
    assert cli.main(["init", "my.yaml", "--data", "mine.jsonl"]) == 0
    assert "note: mine.jsonl holds pairs of answers: `preference: {}` trains on both" in capsys.readouterr().out


def test_the_tokenizer_of_bytes(tmp_path):
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    text = "[INST] Größe  [/INST]\n\t🙂\x00"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode()) and min(ids) > 2 and tokenizer.decode(ids) == text
    assert (tokenizer.eos_token_id, tokenizer.vocab_size, tokenizer("</s>")["input_ids"]) == (2, 259, [2])


def test_train_takes_its_config_by_place_or_by_name(monkeypatch, capsys):
    loaded = []

    def load(file, overrides):
        loaded.append((file, *overrides))
        raise UserError("enough")

    monkeypatch.setattr(train.config, "load", load)
    by_place, by_name = ["a.yaml", "seed=1"], ["--config", "a.yaml"]
    for given in (by_place, ["a.yaml", "--resume", "seed=1"], [*by_name, "seed=1"], ["seed=1", *by_name], ["seed=1", "--resume", *by_name]):
        cli.main(["train", *given])
        cli.train_main(given)
    assert loaded == [("a.yaml", "seed=1")] * 10
    assert cli.main(["train"]) == 2 and "moejax init` writes one" in capsys.readouterr().err


def test_a_value_that_yaml_would_take_for_something_else():
    assert [init._scalar(text) for text in ("a/b.jsonl", "1.0", "a: b", "é #1", "[x")] == ["a/b.jsonl", '"1.0"', '"a: b"', '"é #1"', '"[x"']
