"""Preference training by TRL's DPOTrainer (transformers 5, PEFT, fp32, eager): tests/vectors/preferences.npz. Run: make vectors."""

import json
import tempfile
from pathlib import Path

import families
import numpy as np
import torch
import trl
from check_fused import ATTENTION, PARAMETERS, fill
from datasets import Dataset
from peft import LoraConfig
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent.parent
VECTORS = ROOT / "tests/vectors"
MAX_LENGTH, SMOOTHING, BALANCE = 16, 0.1, 0.02
LENGTHS = ((5, 7, 4), (3, 2, 9), (8, 5, 12), (1, 6, 3))  # prompt, chosen, rejected: the third's rejected side is cut
BETAS = (0.1, 0.5)
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}"
    "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
)


def said(role, content):
    return {"role": role, "content": content}


RECORDS = {
    "apart": [{
        "prompt": [said("user", "What is 2 + 3?"), said("assistant", "5"), said("user", "And 2 + 4?")],
        "chosen": [said("assistant", "The answer is 6.")],
        "rejected": [said("assistant", "Seven")],
    }],
    "whole": [{
        "chosen": [said("user", "Mia has 4 pens. How many?"), said("assistant", "Four.")],
        "rejected": [said("user", "Mia has 4 pens. How many?"), said("assistant", "I do not know the answer.")],
    }],
}  # fmt: skip


def tokenizer():
    made = PreTrainedTokenizerFast.from_pretrained(ROOT / "assets/tiny-mixtral")
    made.chat_template = TEMPLATE
    return made


def mixtral(folder):
    """The model of mixtral.py, and an adapter on everything, the router too."""
    with np.load(VECTORS / "mixtral.npz") as file:
        weights = {name[2:]: np.ascontiguousarray(file[name]) for name in file.files if name.startswith("w/")}
        config = json.loads(str(file["config"])) | {"model_type": "mixtral"}
    save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})
    (Path(folder) / "config.json").write_text(json.dumps(config))
    settings = dict(r=4, lora_alpha=8, target_modules=ATTENTION, target_parameters=PARAMETERS, task_type="CAUSAL_LM")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager"), LoraConfig(**settings)


def qwen3(folder):
    """The Qwen3-MoE of families.py, and its adapter on attention and experts."""
    model, _ = families.make_model(*families.CASES["qwen3_moe"], folder)
    experts = [name for name in PARAMETERS if "gate.weight" not in name]
    return model, LoraConfig(r=2, lora_alpha=4, target_modules=ATTENTION, target_parameters=experts, task_type="CAUSAL_LM")


def trainer(make, folder, records, **settings):
    """TRL's own, its adapter filled with numbers after it was made: the reference stays the base."""
    model, adapter = make(folder)
    usual = dict(
        output_dir=f"{folder}/out", use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], max_length=MAX_LENGTH,
        router_aux_loss_coef=0.0,
    )  # fmt: skip
    made = trl.DPOTrainer(
        model=model, args=trl.DPOConfig(**usual | settings), train_dataset=Dataset.from_list(records), processing_class=tokenizer(),
        peft_config=adapter,
    )  # fmt: skip
    fill(made.model)
    return made


def examples(vocabulary):
    random = np.random.default_rng(7)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [{name: random.integers(3, vocabulary, n).tolist() for name, n in zip(names, lengths, strict=True)} for lengths in LENGTHS]


def computed(made, batch):
    """(loss, gradients by PEFT's names) of TRL on a batch."""
    made.model.zero_grad()
    loss = made.compute_loss(made.model, batch)
    loss.backward()
    grads = {name.replace(".default", ""): p.grad.numpy().copy() for name, p in made.model.named_parameters() if p.grad is not None}
    return loss.item(), grads


def swapped(pairs):
    return [pair | {"chosen_ids": pair["rejected_ids"], "rejected_ids": pair["chosen_ids"]} for pair in pairs]


def of_model(make, some=None):
    """Of `some` losses alone, where they are given."""
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        first = trainer(make, folder, RECORDS["apart"])
        pairs = examples(first.model.config.vocab_size)
        batch, other = first.data_collator(pairs), first.data_collator(swapped(pairs))
        first.model.save_pretrained(f"{folder}/adapter")
        out["adapter"] = np.frombuffer(Path(f"{folder}/adapter/adapter_model.safetensors").read_bytes(), np.uint8)
        out["adapter_config"] = Path(f"{folder}/adapter/adapter_config.json").read_text()
        for pair in pairs:  # its metrics are means: of one pair they are the pair's own
            with torch.no_grad():
                first.compute_loss(first.model, first.data_collator([pair]))
        for name in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "logps/rejected"):
            out[name] = np.array(first._metrics["train"][name][: len(pairs)])
        cases = {("sigmoid", beta, 0.0): {} for beta in BETAS} | {("robust", beta, SMOOTHING): {} for beta in BETAS}
        cases |= {("ipo", beta, 0.0): {} for beta in BETAS} | {("balanced", BETAS[0], 0.0): {"router_aux_loss_coef": BALANCE}}
        for (kind, beta, smoothing), more in cases.items():
            if some is not None and (kind, beta) not in some:
                continue
            loss_type = "sigmoid" if kind == "balanced" else kind
            made = trainer(make, folder, RECORDS["apart"], loss_type=loss_type, beta=beta, label_smoothing=smoothing, **more)
            name = f"{kind}/{beta}"
            loss, grads = computed(made, batch)
            out[f"{name}/loss"] = loss
            out |= {f"{name}/grad/{key}": value for key, value in grads.items()}
            if kind == "sigmoid":  # cDPO is a mean over the pairs as they are and swapped
                turned, turned_grads = computed(made, other)
                out[f"cdpo/{beta}/loss"] = (1 - SMOOTHING) * loss + SMOOTHING * turned
                for key, value in grads.items():
                    out[f"cdpo/{beta}/grad/{key}"] = (1 - SMOOTHING) * value + SMOOTHING * turned_grads[key]
        out["pairs"] = json.dumps(pairs)
        tokenized = [trainer(make, folder, records, max_length=200).train_dataset for records in RECORDS.values()]
        out["ids"] = json.dumps([dict(row) for rows in tokenized for row in rows])
    return out


def main():
    arrays = {"versions": json.dumps(json.loads(families.versions()) | {"trl": trl.__version__}), "template": TEMPLATE}
    arrays |= {"records": json.dumps([record for kind in RECORDS.values() for record in kind])}
    for name, found in (("mixtral", of_model(mixtral)), ("qwen3_moe", of_model(qwen3, [("sigmoid", 0.1), ("ipo", 0.5)]))):
        arrays |= {f"{name}/{key}": value for key, value in found.items()}
    np.savez_compressed(VECTORS / "preferences.npz", **arrays)


if __name__ == "__main__":
    main()
