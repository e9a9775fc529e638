"""A checkpoint is quantized while it is read: the host never holds it whole."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from support import ROOT

from moejax.hub.save import stored_shapes, write_model
from moejax.models.build import build
from moejax.models.config import PRESETS

CHILD = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from moejax.hub import weights
from moejax.models.build import build
from moejax.models.config import Quantization

def load(folder):
    model = build(weights.read_config(Path(folder)), quantization=Quantization(), dtype=jnp.bfloat16)
    return weights.load_weights(model, Path(folder), jax.random.key(0))

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024

load(sys.argv[1])  # compiles what the large one needs
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
before = status("VmRSS")
model = load(sys.argv[2])
print(status("VmHWM") - before, sum(leaf.nbytes for leaf in jax.tree.leaves(jax.block_until_ready(model))))
"""


def written(folder, layers):
    """A Mixtral of this many layers in bf16; its bytes."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_layers": layers, "num_experts": 8, "vocab_size": 512}
    model, rng = build(PRESETS["mixtral-tiny"].replace(**sizes)), np.random.default_rng(0)
    shapes = stored_shapes(model)
    return write_model(model, folder, lambda name: rng.random(shapes[name], np.float32) - 0.5, jnp.bfloat16)


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux says a process's peak")
def test_what_a_quantized_model_takes_while_it_is_loaded(tmp_path):
    written(tmp_path / "small", 1)
    whole = written(tmp_path / "large", 8)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "small"), str(tmp_path / "large")],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak, held = map(int, done.stdout.split())
    assert held < whole / 3 and peak < held + whole / 4
