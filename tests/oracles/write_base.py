"""PyTorch's side of check_base.py: Mixtrals as save_pretrained writes them, in shards, and their logits in fp32."""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import MixtralConfig, MixtralForCausalLM

SIZES = dict(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=128, sliding_window=None, attn_implementation="eager",
)  # fmt: skip


def main():
    folder = Path(sys.argv[1])
    ids = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(1))
    for dtype in ("bfloat16", "float16", "float32"):
        for tied in (False, True):
            torch.manual_seed(0)
            model = MixtralForCausalLM(MixtralConfig(**SIZES, tie_word_embeddings=tied)).eval()
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(0.1 * torch.randn(weight.shape))
            model = model.to(getattr(torch, dtype))
            out = folder / f"{dtype}-{'tied' if tied else 'untied'}"
            model.save_pretrained(out, max_shard_size="100KB")
            # Reloaded: to(bfloat16) also rounds the rotary frequencies, which no checkpoint holds.
            model = MixtralForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager")
            with torch.no_grad():
                logits = model(ids).logits.numpy()
            np.savez(out / "logits.npz", ids=ids.numpy(), logits=logits, versions=transformers.__version__)


if __name__ == "__main__":
    main()
