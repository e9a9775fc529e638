"""A tiny Mixtral as this environment's transformers saves it, and its logits; load_mixtral.py reads both with moejax.

.venv-reference4/bin/python tests/oracles/save_mixtral.py /tmp/saved4   # or .venv-reference5, /tmp/saved5
.venv/bin/python tests/oracles/load_mixtral.py /tmp/saved4
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import MixtralConfig, MixtralForCausalLM


def main():
    folder = Path(sys.argv[1])
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64, rope_theta=1e6, initializer_range=0.2,
        attn_implementation="eager",
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    tokens = torch.randint(0, 64, (2, 24))
    with torch.no_grad():
        logits = model(tokens).logits.numpy()
    model.save_pretrained(folder, max_shard_size="40KB")
    np.savez(folder / "logits.npz", tokens=tokens.numpy(), logits=logits)
    print(f"transformers {transformers.__version__}: {len(list(folder.glob('*.safetensors')))} shards")


if __name__ == "__main__":
    main()
