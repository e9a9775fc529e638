"""Does PEFT >= 0.19 on transformers 5 give our logits with a fused adapter that moejax wrote, and do we with one of PEFT's?

.venv/bin/python tests/oracles/write_adapter.py /tmp/check            # base, adapters in both formats, tokens and our logits
.venv-reference5/bin/python tests/oracles/check_fused.py /tmp/check   # loads and merges ours; writes adapters of its own
.venv/bin/python tests/oracles/read_fused.py /tmp/check               # reads those
"""

import sys
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def fill(model, seed=5):
    """Numbers that matter in every pair (PEFT starts B at zero)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))


def main():
    folder = Path(sys.argv[1])
    with np.load(folder / "logits.npz") as file:
        tokens, base_logits, logits = (file[name] for name in ("tokens", "base", "tuned"))
    ids = torch.from_numpy(tokens).long()
    worst = 0.0

    def base():
        return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32, attn_implementation="eager")

    def run(model):
        with torch.no_grad():
            return model(ids).logits.numpy()

    for name in ("fused", "adapter"):
        tuned = PeftModel.from_pretrained(base(), folder / name)
        difference = np.abs(run(tuned) - logits).max()
        tuned.save_pretrained(folder / f"resaved_{name}")
        merged = np.abs(run(tuned.merge_and_unload()) - logits).max()
        print(f"ours, {name}: loaded {difference:.2g}, merged {merged:.2g}")
        worst = max(worst, difference, merged)
        np.savez(folder / f"resaved_{name}.npz", logits=logits)
    kind = base().config.model_type
    every = [name.replace("gate.weight", "router.weight") if kind == "gpt_oss" else name for name in PARAMETERS]
    twice = dict(rank_pattern={"gate_up_proj": 8}, alpha_pattern={"gate_up_proj": 16})
    for name, parameters, modules, patterns in (
        ("all", every, ATTENTION, {}),
        ("experts", ["gate_up_proj", "down_proj"], [], {}),
        ("up", ["gate_up_proj"], [], {}),
        ("down", ["down_proj"], ["q_proj"], {}),
        ("doubled", every, ATTENTION, twice),
    ):
        settings = dict(r=4, lora_alpha=8, target_modules=modules, target_parameters=parameters, task_type="CAUSAL_LM")
        config = LoraConfig(**settings, **patterns)
        model = get_peft_model(base(), config).eval()
        fill(model)
        model.save_pretrained(folder / f"theirs_{name}")
        theirs = run(model)
        np.savez(folder / f"theirs_{name}.npz", logits=theirs)
        effect = np.abs(theirs - base_logits).max()
        print(f"theirs, {name}: changes logits by {effect:.2g}")
        for key, value in load_file(folder / f"theirs_{name}" / "adapter_model.safetensors").items():
            if ".layers.0.mlp" in key:
                print(f"  {key} {list(value.shape)}")
    return int(worst > 2e-5 or np.abs(logits - base_logits).max() < 0.1)


if __name__ == "__main__":
    sys.exit(main())
