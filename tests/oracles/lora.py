"""LoRA by PEFT 0.18.1 on the weights of mixtral.py: tests/vectors/lora_{experts,all}.npz and peft_{experts,all}/. Run: make vectors."""

import json

import numpy as np
import peft
import torch
from mixtral import OUT, make_batch, make_model, versions
from peft import LoraConfig, get_peft_model

TARGETS = {
    "experts": ["w1", "w2", "w3", "gate"],
    "all": ["w1", "w2", "w3", "gate", "q_proj", "k_proj", "v_proj", "o_proj"],
}
SETTINGS = dict(r=4, lora_alpha=8, lora_dropout=0.0)
LEARNING_RATE, STEPS = 1e-3, 5


def lora_weights(model):
    return {name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name}


def tidy(folder):
    """PEFT keeps targets in a set, whose order changes from run to run: sort them, and drop the empty model card."""
    (folder / "README.md").unlink()
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def train(case, dtype):
    """(model, its first logits and gradients, losses) of STEPS steps on the batch, in this precision; `before`: the first adapters."""
    ids, mask, labels = make_batch()
    model = get_peft_model(make_model(), LoraConfig(target_modules=TARGETS[case], task_type="CAUSAL_LM", **SETTINGS)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in lora_weights(model).values():
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    if dtype == torch.float32:
        model.save_pretrained(OUT / f"peft_{case}")
        tidy(OUT / f"peft_{case}")
    model = model.to(dtype)
    weights = lora_weights(model)
    out = {f"a/{name}": w.detach().clone().numpy() for name, w in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        result = model(input_ids=ids, attention_mask=mask, labels=labels)
        result.loss.backward()
        if step == 0:
            out["logits"] = result.logits.detach().numpy()
            out |= {
                f"grad/{name}": (torch.zeros_like(w) if w.grad is None else w.grad).numpy().copy() for name, w in weights.items()
            }
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        losses.append(result.loss.item())
    out["losses"] = np.array(losses)
    return out | {f"after/{name}": w.detach().numpy() for name, w in weights.items()}


def main():
    for case, targets in TARGETS.items():
        out = {"settings": json.dumps(SETTINGS | {"targets": targets}), "versions": versions(), "peft": peft.__version__}
        out |= train(case, torch.float32)
        # Adam divides a gradient by its own size: where it is rounding noise, PyTorch's own fp32 is off too. float64 says what is right.
        exact = train(case, torch.float64)
        out |= {f"exact_{name}": value.astype(np.float32) for name, value in exact.items() if name.startswith(("after/", "grad/"))}
        off = np.concatenate([np.abs(out[n] - exact[n]).ravel() for n in exact if n.startswith("after/")])
        print(f"{case}: PyTorch's fp32 is off by more than 1e-5 in {(off > 1e-5).sum()} of {off.size} weights, at most by {off.max():.1e}")
        np.savez_compressed(OUT / f"lora_{case}.npz", **out)


if __name__ == "__main__":
    main()
