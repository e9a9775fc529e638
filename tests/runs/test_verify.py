"""`moejax verify` without a model: what lies in a run's folder is read, and what is damaged is named."""

import shutil

import numpy as np
import pytest
from support import ROOT

from moejax.commands import verify as command
from moejax.errors import UserError
from moejax.hub.safetensors_file import write_file
from moejax.runs import verify


@pytest.fixture
def run(tmp_path):
    shutil.copy(ROOT / "configs" / "demo.yaml", tmp_path / "config.yaml")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    tensors = {name: np.arange(6, dtype=np.float32).reshape(2, 3) + i for i, name in enumerate("ab")}
    (tmp_path / "adapter").mkdir()
    write_file(tmp_path / "adapter" / "adapter_model.safetensors", tensors)
    return tmp_path


def wrong(folder):
    return {part: why for part, why in verify.files(folder) if why}


def test_a_whole_run(run):
    assert wrong(run) == {} and len(list(verify.files(run))) == 3


def test_every_byte_of_an_adapter_s_numbers_counts(run):
    path = run / "adapter" / "adapter_model.safetensors"
    content = path.read_bytes()
    for at in range(len(content) - 48, len(content)):  # two tensors of 6 numbers
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert "is not what was written there" in wrong(run)["adapter/adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [("config.yaml", b"name: [", "not valid YAML"), ("metrics.jsonl", b'{"step": 1}\n\x00\x00', "line 2 is not whole"),
     ("adapter/adapter_model.safetensors", b"", "no whole safetensors file")],
)  # fmt: skip
def test_damaged_files_are_named(run, file, content, message, capsys):
    (run / file).write_bytes(content)
    assert message in wrong(run)[file]
    assert command.run(command.argparse.Namespace(run=run)) == 1
    assert f"DAMAGED  {file}: " in capsys.readouterr().out


def test_no_run(tmp_path):
    with pytest.raises(UserError, match=r"holds no config\.yaml"):
        list(verify.files(tmp_path))
