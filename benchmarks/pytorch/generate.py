"""transformers' greedy generate on demand: `python generate.py MODEL PROMPTS.json NEW`. In fp32, with its key-value cache.

Says {"versions": …} once the model is loaded, then answers every line "step" on stdin with {"step_seconds", "cpu_seconds", "tokens"}: one
left-padded batch of all prompts (token ids), NEW tokens each, which nothing ends.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main() -> int:
    folder, file, new = sys.argv[1:]
    prompts = json.loads(Path(file).read_text())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"versions": versions, "threads": torch.get_num_threads()}), flush=True)
    for _ in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        out = model.generate(ids, attention_mask=mask, max_new_tokens=int(new), do_sample=False, pad_token_id=0)
        tokens = out[:, longest:].tolist()
        seconds = {"step_seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        print(json.dumps(seconds | {"tokens": tokens}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
