"""docs/colab.ipynb and docs/tpu.ipynb, their cells as they are, on the bundled model; a TPU's on 8 virtual devices."""

import ast
import json
import os
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from support import ROOT

NOTEBOOKS = [ROOT / "docs/colab.ipynb", ROOT / "docs/tpu.ipynb"]


def settings(cell):
    """The variables that the notebook's first cell of code sets."""
    return {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(cell.source).body}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_a_notebook_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert settings(code[0]) | {"REPOSITORY": "", "NAME": "my_chats"} == settings(code[0])


@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_cells(path, tmp_path, monkeypatch):
    records = json.loads((ROOT / "assets/problems/train.json").read_text())[:40]
    says = ("user", "instruction"), ("assistant", "output")
    talks = [{"messages": [{"role": role, "content": record[key]} for role, key in says]} for record in records]
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, talks)))
    model = tmp_path / "model"
    shutil.copytree(ROOT / "assets/tiny-mixtral", model)
    written = json.loads((model / "tokenizer_config.json").read_text())
    turn = "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}"
    written["chat_template"] = f"{{% for m in messages %}}{turn}{{% endfor %}}"
    (model / "tokenizer_config.json").write_text(json.dumps(written))

    notebook = nbformat.read(path, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    small = "training.steps=4 training.compute_dtype=float32 data.row_tokens=256 data.max_length=256 adapter.rank=2"
    given = settings(first)
    given |= {"MODEL": str(model), "DATA": "talks.jsonl", "OPTIONS": f"{given['OPTIONS']} {small}", "QUESTIONS": ["1 + 2?", "And 3 more?"]}
    given["GGUF"] = "--type f16 --without-tokenizer"  # llama.cpp does not know the bundled one
    first.source = "\n".join(f"{name} = {value!r}" for name, value in given.items())
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    if "mesh.devices=8" in given["OPTIONS"]:
        monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "error:" not in said and "Traceback" not in said, said  # a command that fails stops no notebook
    folder = tmp_path / "runs/my_chats"
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    assert any("image/png" in output.get("data", ()) for output in outputs)
    assert "tokens/s (decoding, without prefill and compile)" in said
    assert (tmp_path / "exported/adapter/adapter_model.safetensors").is_file()
    assert (tmp_path / "exported/merged/config.json").is_file() and list((tmp_path / "exported/gguf").glob("*.gguf"))
