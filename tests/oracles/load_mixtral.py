"""Our side of save_mixtral.py: the largest difference between moejax's logits and transformers'; fails above 2e-5."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moejax.hub.weights import load_weights, read_config
from moejax.models.build import build


def main():
    folder = Path(sys.argv[1])
    with np.load(folder / "logits.npz") as file:
        tokens, expected = jnp.asarray(file["tokens"]), file["logits"]
    model = load_weights(build(read_config(folder), dtype=jnp.float32), folder, jax.random.key(0))
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    logits = np.asarray(model.logits(model(tokens, jnp.ones_like(tokens), positions)[0]))
    difference = np.abs(logits - expected).max()
    print(f"{folder}: largest logit difference {difference:.2g}, largest logit {np.abs(expected).max():.2g}")
    return int(difference > 2e-5)


if __name__ == "__main__":
    sys.exit(main())
