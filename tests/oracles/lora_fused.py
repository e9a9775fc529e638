"""A fused adapter by PEFT >= 0.19 (transformers 5) on the weights of mixtral.py: tests/vectors/peft_fused/. Run: make vectors."""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from check_fused import ATTENTION, PARAMETERS, fill
from peft import LoraConfig, get_peft_model
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

VECTORS = Path(__file__).parent.parent / "vectors"


def main():
    with np.load(VECTORS / "mixtral.npz") as file, tempfile.TemporaryDirectory() as base:
        weights = {name[2:]: np.ascontiguousarray(file[name]) for name in file.files if name.startswith("w/")}
        save_file(weights, f"{base}/model.safetensors", metadata={"format": "pt"})
        (Path(base) / "config.json").write_text(json.dumps(json.loads(str(file["config"])) | {"model_type": "mixtral"}))
        ids, mask = (torch.from_numpy(file[name]).long() for name in ("ids", "mask"))
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    settings = dict(r=4, lora_alpha=8, target_modules=ATTENTION, target_parameters=PARAMETERS, task_type="CAUSAL_LM")
    model = get_peft_model(model, LoraConfig(**settings)).eval()
    fill(model)
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


if __name__ == "__main__":
    main()
