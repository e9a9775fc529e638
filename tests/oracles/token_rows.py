"""PEFT's LoRA with `trainable_token_indices`: tests/vectors/token_rows.npz (PEFT 0.18.1 on transformers 4), and token_rows_5.npz (0.21
on 5), by the environment that runs it. Run: make vectors.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from drawn import weight
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModelForCausalLM

NEWER = int(transformers.__version__.partition(".")[0]) >= 5
OUT = Path(__file__).parent.parent / "vectors" / ("token_rows_5.npz" if NEWER else "token_rows.npz")
STEPS, LEARNING_RATE = 5, 1e-2
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SIZES = dict(
    vocab_size=40, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    num_experts_per_tok=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
CASES = {  # family, tied, vocabulary afterwards, ids by table (a list: PEFT's own choice, the embedding)
    "enlarged": ("mixtral", False, 42, {"embed_tokens": [41, 40, 5], "lm_head": [41, 40, 5]}),
    "tied": ("qwen3_moe", True, 40, [37, 38]),
    "tied, enlarged": ("mixtral", True, 43, {"embed_tokens": [40, 41, 42]}),
    "embedding alone": ("qwen3_moe", False, 40, {"embed_tokens": [39]}),
}


def base(kind, tied, folder):
    """A model of this family whose weights names and shapes decide, in the layout of the released files; and its config.json."""
    experts = {"mixtral": {"num_local_experts": 4}, "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 8}}[kind]
    config = AutoConfig.for_model(kind, **SIZES, **experts, tie_word_embeddings=tied)
    config.save_pretrained(folder)
    e, d, f, heads = 4, 16, 8, {"q_proj": (16, 16), "k_proj": (8, 16), "v_proj": (8, 16), "o_proj": (16, 16)}
    names = ("block_sparse_moe", "w1", "w2", "w3") if kind == "mixtral" else ("mlp", "gate_proj", "down_proj", "up_proj")
    shapes = {"model.embed_tokens.weight": (40, d), "model.norm.weight": (d,)} | ({} if tied else {"lm_head.weight": (40, d)})
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.{norm}.weight": (d,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{prefix}.self_attn.{name}.weight": shape for name, shape in heads.items()}
        shapes |= {f"{prefix}.self_attn.{name}.weight": (8,) for name in ("q_norm", "k_norm") if kind == "qwen3_moe"}
        shapes[f"{prefix}.{names[0]}.gate.weight"] = (e, d)
        for expert, (name, shape) in ((i, pair) for i in range(e) for pair in zip(names[1:], ((f, d), (d, f), (f, d)), strict=True)):
            shapes[f"{prefix}.{names[0]}.experts.{expert}.{name}.weight"] = shape
    save_file({name: weight(name, shape) for name, shape in shapes.items()}, f"{folder}/model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return model, json.loads((Path(folder) / "config.json").read_text())


def main():
    ids = np.random.default_rng(5).integers(3, 40, (2, 11))
    out = {}
    for case, (kind, tied, vocabulary, indices) in CASES.items():
        torch.manual_seed(0)
        tokens, rows = ids.copy(), indices if isinstance(indices, list) else indices["embed_tokens"]
        tokens[:, 3 : 3 + 2 * len(rows)] = rows * 2
        with tempfile.TemporaryDirectory() as folder:
            model, config = base(kind, tied, folder)
            if vocabulary > SIZES["vocab_size"]:
                model.resize_token_embeddings(vocabulary)  # the mean, with a little noise
                out[f"{case}/new"] = model.get_output_embeddings().weight[SIZES["vocab_size"] :].detach().numpy().copy()
            settings = dict(r=2, lora_alpha=4, target_modules=ATTENTION, trainable_token_indices=indices, task_type="CAUSAL_LM")
            tuned = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
            with torch.no_grad():
                for name, parameter in tuned.named_parameters():
                    if "lora_" in name or "trainable_tokens_delta" in name:
                        parameter.copy_(torch.from_numpy(0.3 * weight(name, tuple(parameter.shape))))
            tuned.save_pretrained(f"{folder}/adapter")
            adapter = json.loads(Path(f"{folder}/adapter/adapter_config.json").read_text()) | {"base_model_name_or_path": None}
            adapter["target_modules"].sort()
            stored = Path(f"{folder}/adapter/adapter_model.safetensors").read_bytes()
        out |= {f"{case}/config": json.dumps(config), f"{case}/tokens": tokens, f"{case}/adapter_config": json.dumps(adapter)}
        out[f"{case}/adapter_model"] = np.frombuffer(stored, np.uint8)
        trained = {name.replace(".default", ""): p for name, p in tuned.named_parameters() if p.requires_grad}
        batch, losses = torch.from_numpy(tokens), []
        optimizer = torch.optim.AdamW(trained.values(), lr=LEARNING_RATE, weight_decay=0.0)
        for _ in range(STEPS):
            optimizer.zero_grad()
            result = tuned(input_ids=batch, labels=batch)
            result.loss.backward()
            if not losses:
                out[f"{case}/logits"] = result.logits.detach().numpy()
                out |= {f"{case}/grad/{name}": p.grad.numpy().copy() for name, p in trained.items()}
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            losses.append(result.loss.item())
        out[f"{case}/losses"] = np.array(losses)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    np.savez_compressed(OUT, versions=json.dumps(versions), **out)


if __name__ == "__main__":
    main()
