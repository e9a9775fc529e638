"""Our side of check_adapter.py: a tiny model, a trained-looking adapter on every target, in both formats, and the logits of both.

write_adapter.py FOLDER [PRESET [share] [rows] [tied] [no-experts] [no-router] [sglang]]: of another family with a rank for each group, so
that PEFT's patterns are checked too; with one A for w1 and w3; with trained rows of three tokens, two of which the base may lack; with a
tied head; without experts or router (PEFT 0.18 does not adapt DeepSeek's); as `moejax export --for sglang` writes one. Shared experts and
dense layers are left out: PEFT 0.21 takes their names for the experts'.
"""

import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moejax.hub.peft import adapted, save_adapter
from moejax.hub.save import save_weights
from moejax.hub.servers import SERVERS, rename_targets
from moejax.models.build import build
from moejax.models.config import PRESETS, LoRAConfig


def main():
    folder = Path(sys.argv[1])
    asked = sys.argv[3:]
    config = PRESETS[sys.argv[2] if len(sys.argv) > 2 else "mixtral-tiny"]
    config = config.replace(vocab_size=64, num_layers=2, tie_word_embeddings="tied" in asked)
    left_out = ["w"] * ("no-experts" in asked) + ["gate"] * bool({"no-router", "sglang"} & {*asked})
    targets = tuple(ours for ours, name in config.target_names.items() if "." not in name and not ours.startswith(tuple(left_out)))
    ranks = {"experts": 4, "attention": 8, "router": 2}
    for group in ["experts"] * ("no-experts" in asked) + ["router"] * ("no-router" in asked):
        del ranks[group]
    rank = 4 if len(sys.argv) == 2 or "sglang" in asked else ranks
    adapter = LoRAConfig(rank=rank, alpha=8.0, targets=targets, share=("w1", "w3") if "share" in asked else None)
    adapter = replace(adapter, token_rows=(5, 62, 63) if "rows" in asked else ())
    model = build(config, key=jax.random.key(0), adapter=adapter, dtype=jnp.float32)
    tokens = jax.random.randint(jax.random.key(1), (2, 24), 0, 64)
    arguments = (tokens, jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(24), tokens.shape))
    base = model.logits(model(*arguments)[0])
    for index, lora in enumerate({id(lora): lora for _, lora in adapted(model).values()}.values()):
        lora.b.set_value(0.3 * jax.random.normal(jax.random.key(10 + index), lora.b.get_value().shape))
    for index, rows in enumerate(rows for rows in (model.embed_rows, model.head_rows) if rows is not None):
        rows.rows.set_value(0.1 * jax.random.normal(jax.random.key(index), rows.rows.get_value().shape))
    tuned = model.logits(model(*arguments)[0])
    save_weights(model, folder / "base", jnp.float32)
    save_adapter(model, folder / "adapter", str(folder / "base"))
    if "sglang" in asked:
        rename_targets(SERVERS["sglang"], folder / "adapter")
    save_adapter(model, folder / "fused", str(folder / "base"), fused=True)
    np.savez(folder / "logits.npz", tokens=tokens, base=base, tuned=tuned, lacking=2 if "rows" in asked else 0)


if __name__ == "__main__":
    main()
