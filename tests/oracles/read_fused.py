"""Our side of check_fused.py: reads the adapters that PEFT wrote or saved again, and compares logits."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moejax.hub import peft, weights
from moejax.models.build import build
from moejax.models.config import LoRAConfig

MATRICES = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",), "weight": ("gate",)}


def main():
    folder, worst = Path(sys.argv[1]), 0.0
    with np.load(folder / "logits.npz") as file:
        tokens, base = file["tokens"], file["base"]
    for adapter in sorted(p for pattern in ("theirs_*", "resaved_*") for p in folder.glob(pattern) if p.is_dir()):
        settings = json.loads((adapter / "adapter_config.json").read_text())
        parameters = settings.get("target_parameters") or []
        targets = (*settings["target_modules"], *(w for name in parameters for w in MATRICES[name.rpartition(".")[2]]))
        mixed = 2 if adapter.name == "theirs_doubled" else 1  # its w1 and w3 share an A of twice the rank
        config = LoRAConfig(rank=mixed * settings["r"], alpha=mixed * settings["lora_alpha"], targets=targets)
        model = build(weights.read_config(folder / "base"), adapter=config, dtype=jnp.float32)
        weights.load_weights(model, folder / "base", jax.random.key(0))
        peft.continue_from(model, adapter, str(folder / "base"))
        arguments = (tokens, jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))
        ours = np.asarray(model.logits(model(*arguments)[0]))
        with np.load(folder / f"{adapter.name}.npz") as file:
            theirs = file["logits"]
        difference, effect = np.abs(ours - theirs).max(), np.abs(theirs - base).max()
        print(f"{adapter.name}: largest logit difference {difference:.2g}; the adapter changes logits by {effect:.2g}")
        worst = max(worst, difference)
    return int(worst > 2e-5)


if __name__ == "__main__":
    sys.exit(main())
