"""Does transformers load a merged model that moejax exported, with our logits and our tokens, and generate from it as it stands?

PYTHONPATH=tests .venv/bin/python tests/oracles/write_export.py /tmp/export [tiny-qwen3-moe]  # a run, its merged model, tokens, logits
.venv-reference4/bin/python tests/oracles/check_export.py /tmp/export  # prints the largest difference
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def main():
    folder = Path(sys.argv[1])
    with np.load(folder / "logits.npz") as file:
        tokens, logits, prompt = file["tokens"], file["logits"], str(file["prompt"])
    tokenizer = AutoTokenizer.from_pretrained(folder / "merged")
    same_tokens = tokenizer(prompt).input_ids == tokens.tolist()
    worst, loaded = 0.0, []
    for name in ("merged", "sharded"):
        model, report = AutoModelForCausalLM.from_pretrained(
            folder / name, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        loaded += [key for keys in report.values() for key in keys]  # missing, unexpected, mismatched: none
        with torch.no_grad():
            found = model(torch.from_numpy(tokens)[None].long()).logits[0].numpy()
        worst = max(worst, float(np.abs(found - logits).max()))
    model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=4)  # refuses inputs that the model does not know
    print(
        f"transformers {transformers.__version__}: logits differ by {worst:.2g} of {np.abs(logits).max():.3g}, {len(loaded)} tensors "
        f"missing or left over, tokens {'equal' if same_tokens else 'DIFFER'}"
    )
    return int(worst > 2e-5 * max(1.0, float(np.abs(logits).max())) or bool(loaded) or not same_tokens)


if __name__ == "__main__":
    sys.exit(main())
