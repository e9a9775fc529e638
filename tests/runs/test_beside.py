"""What lies next to the weights goes along: chat template, ends of turn, names of inputs."""

import json
import shutil

import jax.numpy as jnp
import pytest
from support import ROOT
from transformers import AutoTokenizer

from moejax.data.tokenizer import load_tokenizer
from moejax.errors import UserError
from moejax.hub.save import write_config
from moejax.models.config import PRESETS
from moejax.runs.beside import carry

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
GENERATION = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": [2, 510], "temperature": 0.6, "do_sample": True}


@pytest.fixture
def base(tmp_path):
    """The bundled tokenizer with a chat template, and with more ends of turn than its config.json names."""
    shutil.copytree(ROOT / "assets/tiny-mixtral", tmp_path / "base")
    (tmp_path / "base/chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "base/generation_config.json").write_text(json.dumps(GENERATION))
    return tmp_path / "base"


def carried(tmp_path, base, tokenizer, sizes=PRESETS["mixtral-tiny"]):
    write_config(sizes, tmp_path / "out", jnp.bfloat16)
    carry(tmp_path / "out", base, tokenizer, "mistral")
    return {path.name: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}


@pytest.mark.parametrize("own", [False, True])
def test_template_ends_and_names_of_inputs(own, base, tmp_path):
    """The base's tokenizer, or the same tokens from a file that has no template."""
    (tmp_path / "out").mkdir()
    tokenizer = load_tokenizer(str(ROOT / "assets/tiny-mixtral/tokenizer.json" if own else base), ["<|im_end|>"])
    files = carried(tmp_path, base, tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")  # the template's own end of a turn: transformers' generate must know it
    found = files["generation_config.json"]
    assert found == {k: v for k, v in GENERATION.items() if k[0] != "_"} | {"eos_token_id": [2, end, 510]}
    settings = files["tokenizer_config.json"]
    assert settings["model_input_names"] == ["input_ids", "attention_mask"] and settings["chat_template"] == TEMPLATE
    assert files["special_tokens_map.json"]["eos_token"] == "</s>"
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.chat_template == TEMPLATE and set(again("a b")) == {"input_ids", "attention_mask"}
    assert again("Tom has 5  apples")["input_ids"] == tokenizer("Tom has 5  apples")["input_ids"]
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_what_is_not_there_is_not_made_up(base, tmp_path):
    """Another vocabulary keeps its own template (none); nothing to add leaves the config's own generation; no tokenizer, no files."""
    (tmp_path / "out").mkdir()
    tokenizer = load_tokenizer(str(ROOT / "assets/tiny-mixtral/tokenizer.json"))
    other = json.loads((base / "tokenizer.json").read_text())
    other["model"]["vocab"] = {token: len(other["model"]["vocab"]) - 1 - id_ for token, id_ in other["model"]["vocab"].items()}
    (base / "tokenizer.json").write_text(json.dumps(other))
    assert "chat_template" not in carried(tmp_path, base, tokenizer)["tokenizer_config.json"]
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    files = carried(tmp_path, None, None)
    assert files.keys() == {"config.json", "generation_config.json"}
    assert files["generation_config.json"] == {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2}
    files = carried(tmp_path, ROOT / "assets/tiny-blackmamba", None, PRESETS["blackmamba-tiny"])
    assert files["generation_config.json"]["eos_token_id"] == 2
    (base / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"base/generation_config\.json, line 1: no whole JSON"):
        carried(tmp_path, base, None)
