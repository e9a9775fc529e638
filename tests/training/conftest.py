"""A tiny experiment on the bundled problems."""

import json

import pytest
from support import ROOT

from moejax.config import Experiment

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 16,
    "num_experts": 4,
}


@pytest.fixture
def make_experiment(tmp_path):
    """make_experiment(section={field: value}) -> Experiment whose runs lie in tmp_path."""
    problems = json.loads((ROOT / "assets/problems/train.json").read_text())[:60]
    data = tmp_path / "train.json"
    data.write_text(json.dumps(problems))

    def make(name="run", **sections):
        content = {
            "name": name,
            "runs_dir": str(tmp_path / "runs"),
            "model": {"preset": "mixtral-tiny", "overrides": SMALL, "aux_loss_coef": 0.01},
            "quantization": {"format": "nf4"},
            "adapter": {"rank": 2, "alpha": 4.0, "dropout": 0.1},
            "tokenizer": str(ROOT / "assets/tiny-mixtral/tokenizer.json"),
            "data": {"source": str(data), "row_tokens": 64, "max_length": 64, "batch_rows": 4, "holdout": 8},
            "training": {"steps": 20, "learning_rate": 1e-2, "compute_dtype": "float32", "gradient_accumulation": 2},
        }
        for section, changes in sections.items():
            content[section] = changes if changes is None else content.get(section, {}) | changes
        return Experiment.model_validate(content)

    return make
