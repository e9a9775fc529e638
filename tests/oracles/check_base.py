"""Do checkpoints that transformers saved load here with its logits?

.venv-reference4/bin/python tests/oracles/write_base.py /tmp/base  # three precisions, tied and untied heads, in shards
.venv/bin/python tests/oracles/check_base.py /tmp/base             # prints the largest difference of each
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moejax.hub.weights import load_weights, read_config
from moejax.models.build import build


def main():
    worst = 0.0
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        with np.load(folder / "logits.npz") as file:
            ids, expected, version = file["ids"].astype(np.int32), file["logits"], str(file["versions"])
        model = load_weights(build(read_config(folder), dtype=jnp.float32), folder, jax.random.key(0))
        hidden, _ = model(ids, np.ones_like(ids), np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape))
        difference = float(np.abs(model.logits(hidden) - expected).max())
        shards = len(list(folder.glob("*.safetensors")))
        print(f"transformers {version}, {folder.name}, {shards} files: logits differ by {difference:.2g} of {np.abs(expected).max():.3g}")
        worst = max(worst, difference / float(np.abs(expected).max()))
    return int(worst > 2e-5)


if __name__ == "__main__":
    sys.exit(main())
