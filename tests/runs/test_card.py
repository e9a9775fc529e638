"""The card of an export says what the run's records say, as the Hub reads it, and nothing else."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, metadata_load
from support import ROOT

from moejax.config import Experiment
from moejax.models.config import PRESETS
from moejax.runs import card

MIXTRAL = PRESETS["mixtral-tiny"]
STEP = {"step_seconds": 1.0, "queries": 3, "real_tokens": 100, "supervised_tokens": 40}


def experiment(tmp_path, **sections):
    content = {
        "name": "run", "model": {"source": str(tmp_path / "base")}, "quantization": {"format": "nf4"},
        "adapter": {"rank": {"experts": 4, "attention": 8}, "alpha": 16, "targets": ["q_proj", "w1", "w2", "w3"]},
        "data": {"source": [{"source": str(ROOT / "assets/problems/train.json"), "weight": 2.0}, "owner/chats"], "template": "mistral"},
        "training": {"steps": 2}, "eval": {"task": "problems", "data": str(ROOT / "assets/problems/test.json")},
    }  # fmt: skip
    return Experiment.model_validate(content | sections)


@pytest.fixture
def folders(tmp_path):
    for name in ("base", "run", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "out/adapter_config.json").write_text("{}")
    return tmp_path


def written(tmp_path, e, use="", sizes=MIXTRAL):
    card.write(tmp_path / "out", use, tmp_path / "run", e, sizes, tmp_path / "base")
    return metadata_load(tmp_path / "out/README.md") or {}, ModelCard.load(tmp_path / "out/README.md").text


def test_what_the_run_knows(folders):
    (folders / "base/README.md").write_text("---\nlicense: other\nlicense_name: theirs\nlanguage: en\n---\n# Base\n")
    score = {"eval/accuracy": 0.25, "eval/accuracy_low": 0.2, "eval/accuracy_high": 0.3, "eval/problems": 60, "eval/epoch": 0.0}
    lines = [
        {"step": 0, **score}, {"step": 1, "epoch": 0.5, **STEP}, {"step": 2, "epoch": 1.0, **STEP}, {"step": 2, "epoch": 1.0, **STEP},
        {"step": 1, "eval_loss": 3.0}, {"step": 2, "eval_loss": 1.23456}, {"step": 2, **score, "eval/accuracy": 0.75},
    ]  # fmt: skip
    (folders / "run/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, n in (("gsm8k", 0.5), ("gsm8k-base", 0.125), ("step-2", 0.9)):
        (folders / "run/eval" / name).mkdir(parents=True)
        (folders / "run/eval" / name / "result.json").write_text(json.dumps({"task": "gsm8k", "n": 8, "accuracy": n}))
    match = {"data": str(ROOT / "assets/problems/test.json"), "problems": 60, "accuracy": {"always 3": 0.1, "base": 0.05, "tuned": 0.8}}
    (folders / "run/exact_match.json").write_text(json.dumps(match))
    front, text = written(folders, experiment(folders), "USE")
    assert front == {
        "datasets": ["owner/chats"], "library_name": "peft", "license": "other", "license_name": "theirs",
        "pipeline_tag": "text-generation", "tags": ["moejax", "moe", "qlora"],
    }  # fmt: skip
    for line in (
        "# run", "A LoRA adapter for `base` (Mixtral), trained with moejax ", "## Use\n\nUSE", "| `train.json` |  | 2 |",
        "| `owner/chats` | train | 1 |",
        "2 steps (1 epochs) saw 6 queries of 200 tokens, of which 80 were trained on.", "| method | LoRA over 4-bit (nf4) weights |",
        "| rank, alpha, dropout | experts 4, attention 8, 16, 0 |", "| targets | q_proj, w1, w2, w3 |",
        "| loss on held-out data, after step 2 | 1.2346 |",
        "| problems, 60 problems, after step 2 | 75.0 % (95 % interval 20.0 to 30.0 %) |",
        "| problems, the untrained model | 25.0 % |", "| gsm8k, 8 problems | 50.0 % |", "| gsm8k, 8 problems, the base | 12.5 % |",
        "| exact match, 60 problems of `test.json`, this model | 80.0 % |", "always 3 | 10.0 % |",
    ):  # fmt: skip
        assert line in text
    assert str(folders) not in text and str(ROOT) not in text and "90.0 %" not in text


def test_what_it_does_not_know_is_left_out(folders):
    """No records, a base from the Hub without a card, a damaged result; a merged model."""
    (folders / "out/adapter_config.json").unlink()
    (folders / "run/exact_match.json").write_text("{")
    e = experiment(folders, model={"source": "owner/base"}, eval=None, quantization={}, training={"steps": 2, "learning_rate": 1e-4})
    front, text = written(folders, e)
    assert front == {
        "base_model": "owner/base", "base_model_relation": "finetune", "datasets": ["owner/chats"], "library_name": "transformers",
        "pipeline_tag": "text-generation", "tags": ["moejax", "moe"],
    }  # fmt: skip
    assert "A model (Mixtral), trained from `owner/base` with moejax" in text and "learning rate 0.0001" in text
    assert "## Scores" not in text and "## Use" not in text and " steps (" not in text
    (folders / "base/README.md").write_text("---\nlicense: [\n---\n")
    assert written(folders, experiment(folders))[0].get("license") is None


def test_how_it_is_loaded():
    rows = MIXTRAL.replace(vocab_size=514, new_rows=2)
    text = card.use("peft", rows, "owner/base", "mine", 8, None)
    assert 'from_pretrained("owner/base", dtype="auto", num_experts_per_tok=8)' in text and "resize_token_embeddings(514)" in text
    assert 'PeftModel.from_pretrained(model, "mine")' in text and 'AutoTokenizer.from_pretrained("mine")' in text
    assert 'AutoTokenizer.from_pretrained("owner/base")' in card.use("peft", MIXTRAL, "owner/base", "mine", None, None)
    assert card.base_name("owner/base") == "owner/base" and card.base_name(str(Path(__file__).parent)) == "path/to/runs"
    assert 'AutoTokenizer.from_pretrained("mine")' in card.use("merged", MIXTRAL, "owner/base", "mine", None, None)
    assert card.use("peft", MIXTRAL, "b", "m", None, "vllm serve b") == "```\nvllm serve b\n```"
    assert card.use("merged", PRESETS["blackmamba-tiny"], "b", "m", None, None) == ""
