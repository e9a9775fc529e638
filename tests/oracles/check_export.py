"""Does transformers load a merged model that moejax exported, with our logits and our tokens, and answer in a chat, as it stands, what the
merged model answers here?

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
        tokens, logits, prompt, asked, answers = (file[name] for name in ("tokens", "logits", "prompt", "asked", "answers"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "merged")
    same_tokens = tokenizer(str(prompt)).input_ids == tokens.tolist()
    worst, loaded = 0.0, []
    for name in ("merged", "sharded"):
        model, report = AutoModelForCausalLM.from_pretrained(
            folder / name, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        loaded += [key for keys in report.values() for key in keys]  # missing, unexpected, mismatched: none
        with torch.no_grad():
            found = model(torch.from_numpy(tokens)[None].long()).logits[0].numpy()
        worst = max(worst, float(np.abs(found - logits).max()))
    talk = tokenizer.apply_chat_template([{"role": "user", "content": str(asked)}], add_generation_prompt=True, tokenize=False)
    given = [tokenizer(talk, add_special_tokens=False, return_tensors="pt"), tokenizer(f"[INST] {asked} [/INST]", return_tensors="pt")]
    # generate refuses inputs that the model does not know, and ends where generation_config.json says.
    made = [model.generate(**one, max_new_tokens=24, do_sample=False)[0, one.input_ids.shape[1] :] for one in given]
    said = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in made]
    of_run, of_merged = ([str(one).strip() for one in several] for several in answers)
    same, own = said == of_merged, "the" if said == of_run else "not the"
    print(
        f"transformers {transformers.__version__}: logits differ by {worst:.2g} of {np.abs(logits).max():.3g}, {len(loaded)} tensors "
        f"missing or left over, tokens {'equal' if same_tokens else 'DIFFER'}; its answers (in a chat, to a text) are "
        f"{'' if same else 'NOT '}the merged model's here, and {own} run's own: {said}"
    )
    return int(worst > 2e-5 * max(1.0, float(np.abs(logits).max())) or bool(loaded) or not (same_tokens and same))


if __name__ == "__main__":
    sys.exit(main())
