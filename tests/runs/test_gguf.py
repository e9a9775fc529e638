"""`moejax export --format gguf`: the merged model for llama.cpp, whole or not at all."""

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from support import ROOT, finished_run
from tiny_tokenizers import byte_level

from moejax import cli
from moejax.errors import UserError
from moejax.hub import gguf_file, peft
from moejax.runs import export


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    finished_run(folder)
    return folder


@pytest.fixture(scope="module")
def known_tokenizer(tmp_path_factory):
    """A tokenizer that llama.cpp knows, with a chat template, of fewer tokens than the bundled models have rows."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = byte_level()
    messages = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    tokenizer.chat_template = messages + "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer.save_pretrained(folder)
    return folder


def test_the_merged_model(run_folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["export", str(run_folder), "--out", str(out), "--format", "gguf", "--type", "bf16", "--without-tokenizer"]) == 0
    said = capsys.readouterr().out
    assert "verified on" in said and "bf16 GGUF file run-bf16.gguf, without a tokenizer: it takes and gives token ids" in said
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "run-bf16.gguf"]
    export.export(run_folder, tmp_path / "hub", "merged", False, None)
    expected = load_file(tmp_path / "hub" / "model.safetensors")
    config = export.architecture(export.open_run(run_folder), ROOT / "assets/tiny-mixtral")
    found = gguf_file.open_tensors(out / "run-bf16.gguf", config, "bf16")
    assert found.keys() == expected.keys()
    for name, source in found.items():
        np.testing.assert_array_equal(source.read().astype(ml_dtypes.bfloat16), expected[name], err_msg=name)


def test_tokenizer_template_and_modelfile(known_tokenizer, tmp_path, capsys):
    finished_run(tmp_path / "run", tokenizer=str(known_tokenizer), data={"source": "x.json", "template": "chat"})
    export.export(tmp_path / "run", tmp_path / "out", "gguf", False, None)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Modelfile", "README.md", "run-f16.gguf"]
    keys = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "out" / "run-f16.gguf").fields.items()}
    assert len(keys["tokenizer.ggml.tokens"]) == 512 and keys["tokenizer.ggml.pre"] == "gpt-2"
    assert keys["tokenizer.chat_template"].startswith("{% for m in messages %}")
    assert (keys["tokenizer.ggml.eos_token_id"], keys["tokenizer.ggml.eot_token_id"]) == (0, 2)
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text.startswith('FROM ./run-f16.gguf\nTEMPLATE """') and "user: {{ end }}{{ $m.Content }}<|im_end|>assistant: " in text


@pytest.mark.parametrize("kind", ["f16", pytest.param("q8_0", marks=pytest.mark.long)])
def test_a_delta_that_is_lost(kind, run_folder, tmp_path, monkeypatch):
    complete = export._abstract

    def without_adapter(*arguments):
        model = complete(*arguments)
        for _, lora in peft.adapted(model).values():
            lora.b.set_value(0 * lora.b.get_value())
        return model

    monkeypatch.setattr(export, "_abstract", without_adapter)
    with pytest.raises(UserError, match="does not compute what was trained"):
        export.export(run_folder, tmp_path / "m", "gguf", True, None, None, kind, False)
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused_before_anything_is_written(run_folder, tmp_path, capsys):
    def refused(*arguments, run=run_folder):
        assert cli.main(["export", str(run), "--out", str(tmp_path / "m"), *arguments]) == 2
        assert not (tmp_path / "m").exists()
        return capsys.readouterr().err

    assert "llama.cpp cannot hold this tokenizer: it knows no such pre-tokenizer" in refused("--format", "gguf")
    assert "--type q4_0: expected one of f16, bf16, q8_0" in refused("--format", "gguf", "--type", "q4_0")
    assert "--type is of --format gguf, and this is merged" in refused("--format", "merged", "--type", "f16")
    assert "--without-tokenizer is of --format gguf, and this is peft" in refused("--without-tokenizer")
    finished_run(tmp_path / "mamba", adapter=None, quantization={}, model={"source": str(ROOT / "assets/tiny-blackmamba")})
    (tmp_path / "mamba" / "model").symlink_to(ROOT / "assets/tiny-blackmamba")
    assert "a BlackMamba is not written as GGUF: Mixtral, Qwen3-MoE, OLMoE are" in refused("--format", "gguf", run=tmp_path / "mamba")
    (tmp_path / "m").mkdir()
    assert cli.main(["export", str(run_folder), "--out", str(tmp_path / "m"), "--format", "gguf"]) == 2
    assert "exists already: choose another --out" in capsys.readouterr().err
