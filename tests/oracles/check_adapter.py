"""Does PEFT 0.18.1 on transformers 4.57.6 give our logits with an adapter that moejax wrote?

.venv/bin/python tests/oracles/write_adapter.py /tmp/check            # base, adapter, tokens and our logits
.venv-reference4/bin/python tests/oracles/check_adapter.py /tmp/check  # prints the largest difference
"""

import sys
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main():
    folder = Path(sys.argv[1])
    with np.load(folder / "logits.npz") as file:
        tokens, base_logits, logits, lacking = (file[name] for name in ("tokens", "base", "tuned", "lacking"))
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        ids = torch.from_numpy(tokens).long()
        base_difference = np.abs(base(ids).logits.numpy() - base_logits).max()
        if lacking:  # as a base that never had the tokens, and was enlarged for them
            rows = base.config.vocab_size
            base.resize_token_embeddings(rows - int(lacking))
            base.resize_token_embeddings(rows)
        tuned = PeftModel.from_pretrained(base, folder / "adapter")
        difference = np.abs(tuned(ids).logits.numpy() - logits).max()
        merged = np.abs(tuned.merge_and_unload()(ids).logits.numpy() - logits).max()
    effect = np.abs(logits - base_logits).max()
    print(
        f"base {base_difference:.2g}, adapter {difference:.2g}, merged {merged:.2g}; the adapter changes logits by {effect:.2g}"
    )
    return int(max(base_difference, difference, merged) > 2e-5 or effect < 0.1)


if __name__ == "__main__":
    sys.exit(main())
