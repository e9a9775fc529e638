"""transformers' greedy generate on demand: `python generate.py MODEL PROMPTS.json NEW`. In fp32, with its key-value cache.

Says {"versions": …} once the model is loaded, then answers every line "step" on stdin with {"step_seconds", "tokens"}: one
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


def say(message: dict[str, object]) -> None:
    print(json.dumps(message), flush=True)


@torch.no_grad()
def main() -> int:
    folder, file, new = sys.argv[1:]
    prompts = json.loads(Path(file).read_text())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    say(
        {"versions": {"torch": torch.__version__, "transformers": transformers.__version__}, "threads": torch.get_num_threads()}
    )
    for _ in sys.stdin:
        start = time.perf_counter()
        out = model.generate(ids, attention_mask=mask, max_new_tokens=int(new), do_sample=False, pad_token_id=0)
        tokens = out[:, longest:].tolist()
        say({"step_seconds": time.perf_counter() - start, "tokens": tokens})
    return 0


if __name__ == "__main__":
    sys.exit(main())
