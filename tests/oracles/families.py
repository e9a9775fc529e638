"""Families of attention and experts in transformers 5 (fp32, eager): tests/vectors/families.npz. Run: make vectors.

families.py CASE …: those alone; what the file has of others stays as it is (another CPU would sum them in another order).
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from check_fused import PARAMETERS, fill
from drawn import weight
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModelForCausalLM

OUT = Path(__file__).parent.parent / "vectors"
SIZES = dict(
    vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=2,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
)  # fmt: skip
QWEN3 = dict(SIZES, head_dim=8, moe_intermediate_size=12, intermediate_size=40, num_experts=6, rms_norm_eps=1e-6)
OLMOE = dict(SIZES, intermediate_size=12, num_experts=6, rms_norm_eps=1e-5)
FLEX = dict(OLMOE, rms_norm_eps=1e-6)
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 2.0, "original_max_position_embeddings": 16}
GPT_OSS = dict(
    SIZES, head_dim=8, intermediate_size=12, num_local_experts=6, rms_norm_eps=1e-5, sliding_window=4, swiglu_limit=1.5, bos_token_id=None,
    tie_word_embeddings=False, rope_parameters=dict(YARN, truncate=False),
)  # fmt: skip
LATENT = dict(
    SIZES, num_key_value_heads=4, moe_intermediate_size=12, intermediate_size=20, n_routed_experts=6, n_shared_experts=2, kv_lora_rank=11,
    qk_nope_head_dim=7, qk_rope_head_dim=6, v_head_dim=9, n_group=1, topk_group=1, rms_norm_eps=1e-5, tie_word_embeddings=False,
)  # fmt: skip
DEEPSEEK3 = dict(LATENT, q_lora_rank=None, first_k_dense_replace=1, routed_scaling_factor=2.446, norm_topk_prob=True)
DEEPSEEK2 = dict(
    DEEPSEEK3, routed_scaling_factor=1.5, norm_topk_prob=False, topk_method="greedy", rms_norm_eps=1e-6, kv_lora_rank=12,
    qk_nope_head_dim=8,  # transformers turns complex pairs, of even places in memory alone
    rope_parameters=dict(YARN, mscale=0.5, mscale_all_dim=0.707),
)  # fmt: skip
GLM = dict(LATENT, q_lora_rank=10, routed_scaling_factor=1.8, norm_topk_prob=True)
CASES = {
    "qwen3_moe": ("qwen3_moe", dict(QWEN3, norm_topk_prob=True, tie_word_embeddings=False)),
    "qwen3_moe_dense": ("qwen3_moe", dict(QWEN3, norm_topk_prob=True, tie_word_embeddings=False, num_experts_per_tok=6)),
    "qwen3_moe_raw_tied": ("qwen3_moe", dict(QWEN3, norm_topk_prob=False, tie_word_embeddings=True)),
    "qwen3_moe_yarn": ("qwen3_moe", dict(QWEN3, norm_topk_prob=True, tie_word_embeddings=False, rope_parameters=YARN)),
    "olmoe": ("olmoe", dict(OLMOE, norm_topk_prob=False, tie_word_embeddings=False)),
    "flex_olmo": ("flex_olmo", dict(FLEX, norm_topk_prob=False, tie_word_embeddings=False)),
    "flex_olmo_dense": ("flex_olmo", dict(FLEX, norm_topk_prob=False, tie_word_embeddings=False, num_experts_per_tok=6)),
    "gpt_oss": ("gpt_oss", GPT_OSS),
    "gpt_oss_dense": ("gpt_oss", dict(GPT_OSS, num_experts_per_tok=6)),
    "gpt_oss_layers": ("gpt_oss", dict(GPT_OSS, num_hidden_layers=3, layer_types=["full_attention", *["sliding_attention"] * 2])),
    "deepseek_v3": ("deepseek_v3", dict(DEEPSEEK3, num_hidden_layers=3)),
    "deepseek_v3_dense": ("deepseek_v3", dict(DEEPSEEK3, norm_topk_prob=False, num_experts_per_tok=6, q_lora_rank=10)),
    "deepseek_v3_halves": ("deepseek_v3", dict(DEEPSEEK3, rope_interleave=False)),
    "glm4_moe_lite": ("glm4_moe_lite", GLM),
    "glm4_moe_lite_halves": ("glm4_moe_lite", dict(GLM, rope_interleave=False)),
    "deepseek_v2": ("deepseek_v2", DEEPSEEK2),
    "olmoe_summed": ("olmoe", dict(OLMOE, norm_topk_prob=True, tie_word_embeddings=False, num_key_value_heads=4)),
}
FILES = {"gpt_oss": "gpt_oss.npz", **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite"), "latent.npz")}
"""The vectors of a family, where they are not in families.npz."""
LENGTHS, PROMPTS = (13, 9, 5), (4, 2, 1)


def per_expert(name, value, kind=None):
    """A tensor of transformers 5's model as the released files hold it: [(name, array)]."""
    if not name.endswith(("gate_up_proj", "down_proj")) or ".experts." not in name or kind == "gpt_oss":
        return [(name, value)]
    prefix, _, own = name.rpartition(".")
    parts = {"gate_proj": value[:, : value.shape[1] // 2], "up_proj": value[:, value.shape[1] // 2 :]}
    parts = parts if own == "gate_up_proj" else {"down_proj": value}
    return [(f"{prefix}.{e}.{part}.weight", array[e]) for part, array in parts.items() for e in range(len(array))]


def make_batch():
    """Right-padded token ids, attention mask, and labels with the prompt masked out."""
    ids = np.random.default_rng(3).integers(3, SIZES["vocab_size"], (len(LENGTHS), max(LENGTHS)))
    position = np.arange(max(LENGTHS))[None]
    mask = (position < np.array(LENGTHS)[:, None]).astype(np.int64)
    ids = ids * mask
    return ids, mask, np.where((position >= np.array(PROMPTS)[:, None]) & (mask == 1), ids, -100)


def make_model(kind, settings, folder):
    """A model as transformers reads it from files in the layout of the Hub's, written here; and its config.json."""
    config = AutoConfig.for_model(kind, **settings)
    config.save_pretrained(folder)
    shapes = AutoModelForCausalLM.from_config(config).state_dict()
    tied = {"lm_head.weight"} if settings["tie_word_embeddings"] else set()
    tensors = dict(pair for name, value in shapes.items() if name not in tied for pair in per_expert(name, value.numpy(), kind))
    save_file({name: weight(name, v.shape) for name, v in tensors.items()}, f"{folder}/model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return model, json.loads((Path(folder) / "config.json").read_text())


def counts(model, ids, mask):
    """Choices per layer and expert over real tokens, as the layers' own routers make them."""
    routers = [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]
    chosen = []
    hooks = [router.register_forward_hook(lambda *call: chosen.append(call[-1][2])) for router in routers]
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    real = [indices[mask.reshape(-1).bool()].reshape(-1) for indices in chosen]
    return torch.stack([torch.bincount(one, minlength=router.num_experts) for one, router in zip(real, routers, strict=True)]).numpy()


def versions():
    """JSON: of what made a file."""
    made_by = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    return json.dumps(made_by | {"python": sys.version.split()[0]})


def kept(path, asked):
    """What a file of vectors has of cases that are not asked for; of none where all are made. Same versions, or it is no one file."""
    if not asked or not path.is_file():
        return {}
    with np.load(path) as file:
        if str(file["versions"]) != versions():
            raise SystemExit(f"{path} was made by {file['versions']}, this is {versions()}: make all cases (no arguments)")
        return {name: file[name] for name in file.files if name.partition("/")[0] not in asked}


def main():
    asked = sys.argv[1:]
    for file in dict.fromkeys(FILES.get(CASES[case][0], "families.npz") for case in asked or CASES):
        write(file, asked)


def write(file, asked):
    """A file of vectors: of the cases that are asked for, or all of it."""
    arrays = make_batch()
    ids, mask, labels = (torch.from_numpy(a) for a in arrays)
    out = kept(OUT / file, asked) | dict(zip(("ids", "mask", "labels"), arrays, strict=True))
    out["versions"] = versions()
    for case in (case for case in asked or CASES if FILES.get(CASES[case][0], "families.npz") == file):
        kind, settings = CASES[case]
        with tempfile.TemporaryDirectory() as folder:
            model, config = make_model(kind, settings, folder)
            result = model(input_ids=ids, attention_mask=mask, labels=labels)
            result.loss.backward()
            out[f"{case}/config"] = json.dumps(config)
            out |= {f"{case}/logits": result.logits.detach().numpy(), f"{case}/loss": result.loss.item()}
            out[f"{case}/counts"] = counts(model, ids, mask)
            for name, parameter in model.named_parameters():
                out |= {f"{case}/grad/{part}": value for part, value in per_expert(name, parameter.grad.numpy(), kind)}
            if kind in FILES:
                out |= {f"{case}/generated/{row}": tokens for row, tokens in enumerate(generated(model, ids))}
            if case == kind:  # the first of each family
                out[f"{case}/settings"] = type(model.config)().to_json_string(use_diff=False)
                out |= {f"{case}/{key}": value for key, value in adapter(model, ids, mask, folder).items()}
    np.savez_compressed(OUT / file, **out)


def generated(model, ids):
    """Greedy, 9 tokens after the prompts of `make_batch`'s first two rows, each alone; nothing ends a sequence."""
    for row, length in enumerate((7, 3)):
        tokens = ids[row : row + 1, :length]
        with torch.no_grad():
            yield model.generate(tokens, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)[0, length:].numpy()


def adapted(model):
    """The model with PEFT's own adapter on attention and on the fused experts."""
    experts = [name for name in PARAMETERS if ".experts." in name]
    linear = [name for name, module in model.model.layers[0].self_attn.named_children() if isinstance(module, torch.nn.Linear)]
    settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=linear, target_parameters=experts, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, settings).eval()
    fill(tuned)
    return tuned


def adapter(model, ids, mask, folder):
    """Its tensors, settings and logits."""
    tuned = adapted(model)
    tuned.save_pretrained(f"{folder}/adapter")
    config = json.loads(Path(f"{folder}/adapter/adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    for name in ("target_modules", "target_parameters"):  # PEFT keeps both in sets, whose order changes from run to run
        config[name].sort()
    with torch.no_grad():
        logits = tuned(input_ids=ids, attention_mask=mask).logits.numpy()
    with Path(f"{folder}/adapter/adapter_model.safetensors").open("rb") as file:
        stored = Path(file.name).read_bytes()
    return {"peft/adapter_config": json.dumps(config), "peft/adapter_model": np.frombuffer(stored, np.uint8), "peft/logits": logits}


if __name__ == "__main__":
    main()
