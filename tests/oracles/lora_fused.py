"""Fused adapters by PEFT >= 0.19 (transformers 5): tests/vectors/peft_fused/, and lora_fused.npz with gradients. Run: make vectors.

lora_fused.py CASE …: those of lora_fused.npz alone.
"""

import json
import sys
import tempfile
from pathlib import Path

import families
import numpy as np
import torch
from check_fused import ATTENTION, PARAMETERS, fill
from peft import LoraConfig, get_peft_model
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

VECTORS = Path(__file__).parent.parent / "vectors"
STEPS, LEARNING_RATE = 5, 1e-3


def mixtral(folder, dense):
    """(adapted model, ids, mask, labels) on the weights of mixtral.py."""
    with np.load(VECTORS / "mixtral.npz") as file:
        weights = {name[2:]: np.ascontiguousarray(file[name]) for name in file.files if name.startswith("w/")}
        save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})
        config = json.loads(str(file["config"])) | {"model_type": "mixtral"}
        config |= {"num_experts_per_tok": config["num_local_experts"]} if dense else {}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        batch = [torch.from_numpy(file[name]).long() for name in ("ids", "mask", "labels")]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    settings = dict(r=4, lora_alpha=8, target_modules=ATTENTION, target_parameters=PARAMETERS, task_type="CAUSAL_LM")
    model = get_peft_model(model, LoraConfig(**settings)).eval()
    fill(model)
    return model, *batch


def family(case, folder):
    """The same of a case of families.py, with the adapter that families.npz has."""
    model, _ = families.make_model(*families.CASES[case], folder)
    return families.adapted(model), *map(torch.from_numpy, families.make_batch())


def trained(model, ids, mask, labels):
    """Logits, loss and gradients of the first step, and the losses of all, by AdamW without decay behind clipping to 1."""
    weights = {name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name}
    optimizer = torch.optim.AdamW(weights.values(), lr=LEARNING_RATE, weight_decay=0.0)
    out, losses = {}, []
    for _ in range(STEPS):
        optimizer.zero_grad()
        result = model(input_ids=ids, attention_mask=mask, labels=labels)
        result.loss.backward()
        if not losses:
            out["logits"] = result.logits.detach().numpy()
            out |= {f"grad/{name}": w.grad.numpy().copy() for name, w in weights.items()}
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        losses.append(result.loss.item())
    return out | {"losses": np.array(losses)}


CASES = (
    "mixtral", "mixtral_dense", "qwen3_moe", "qwen3_moe_dense", "olmoe", "flex_olmo", "gpt_oss", "gpt_oss_dense", "deepseek_v3",
    "glm4_moe_lite", "deepseek_v2",
)  # fmt: skip


def write_folder():
    """peft_fused/: PEFT's own files and the logits."""
    with tempfile.TemporaryDirectory() as base:
        model, ids, mask, _ = mixtral(base, dense=False)
    out = VECTORS / "peft_fused"
    model.save_pretrained(out)
    (out / "README.md").unlink()
    path = out / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": None}
    for name in ("target_modules", "target_parameters"):  # PEFT keeps both in sets, whose order changes from run to run
        config[name].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    with torch.no_grad():
        np.savez_compressed(out / "logits.npz", logits=model(input_ids=ids, attention_mask=mask).logits.numpy())


def main():
    asked = sys.argv[1:]
    if not asked:
        write_folder()
    arrays = families.kept(VECTORS / "lora_fused.npz", asked) | {"versions": families.versions()}
    for case in asked or CASES:
        with tempfile.TemporaryDirectory() as folder:
            of_mixtral = case.startswith("mixtral")
            made = mixtral(folder, case.endswith("dense")) if of_mixtral else family(case, folder)
            arrays |= {f"{case}/{name}": value for name, value in trained(*made).items()}
    np.savez_compressed(VECTORS / "lora_fused.npz", **arrays)


if __name__ == "__main__":
    main()
