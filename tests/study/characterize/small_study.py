"""What the tests characterize: a tiny Mixtral, as few trials as there are kinds."""

from pathlib import Path

import yaml
from support import ROOT, TINY

from moejax.study.report.results import Environment

FAKE = Path(__file__).parent / "fake_trial.py"
SIZES = [
    "sweep.routings=[sparse]", "sweep.batches=[1, largest]", "sweep.packed=[largest]", "sweep.queries=8", "sweep.breakdown_tokens=32",
    "sweep.lengths=[32]", "sweep.tune_steps=2", "sweep.load_queries=8", "sweep.timed=2", "sweep.traced=1",
]  # fmt: skip
ENVIRONMENT = Environment("a CPU", "cpu", 10**9, 1e10, 1e9, "measured", {"jax": "0"}, "a CPU", "abc", "0123")


def write_config(folder, **sections):
    """A tiny Mixtral by QLoRA on the bundled problems; returns the file. A section None: left out."""
    content = {
        "name": "tiny",
        "model": {"preset": "mixtral-tiny", "overrides": TINY},
        "quantization": {"format": "nf4"},
        "adapter": {"rank": 2, "alpha": 4.0},
        "tokenizer": str(ROOT / "assets/tiny-mixtral/tokenizer.json"),
        "data": {"source": str(ROOT / "assets/problems/test.json"), "row_tokens": 64, "max_length": 64},
        "training": {"epochs": 1, "learning_rate": 1e-3, "compute_dtype": "float32"},
    }
    for name, changes in sections.items():
        content[name] = changes and content.get(name, {}) | changes
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(content))
    return str(file)
