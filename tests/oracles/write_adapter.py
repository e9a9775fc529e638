"""Our side of check_adapter.py: a tiny model, a trained-looking adapter on every target, in both formats, and the logits of both.

write_adapter.py FOLDER [PRESET [share]]: of another family with a rank for each group, so that PEFT's patterns are checked too; with one A
for w1 and w3.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moejax.hub.peft import adapted, save_adapter
from moejax.hub.save import save_weights
from moejax.models.build import build
from moejax.models.config import LORA_TARGETS, PRESETS, LoRAConfig


def main():
    folder = Path(sys.argv[1])
    config = PRESETS[sys.argv[2] if len(sys.argv) > 2 else "mixtral-tiny"].replace(vocab_size=64, num_layers=2)
    rank = 4 if len(sys.argv) == 2 else {"experts": 4, "attention": 8, "router": 2}
    adapter = LoRAConfig(rank=rank, alpha=8.0, targets=LORA_TARGETS, share=("w1", "w3") if sys.argv[3:] == ["share"] else None)
    model = build(config, key=jax.random.key(0), adapter=adapter, dtype=jnp.float32)
    tokens = jax.random.randint(jax.random.key(1), (2, 24), 0, 64)
    arguments = (tokens, jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(24), tokens.shape))
    base = model.logits(model(*arguments)[0])
    for index, lora in enumerate({id(lora): lora for _, lora in adapted(model).values()}.values()):
        lora.b.set_value(0.3 * jax.random.normal(jax.random.key(10 + index), lora.b.get_value().shape))
    tuned = model.logits(model(*arguments)[0])
    save_weights(model, folder / "base", jnp.float32)
    save_adapter(model, folder / "adapter", str(folder / "base"))
    save_adapter(model, folder / "fused", str(folder / "base"), fused=True)
    np.savez(folder / "logits.npz", tokens=tokens, base=base, tuned=tuned)


if __name__ == "__main__":
    main()
