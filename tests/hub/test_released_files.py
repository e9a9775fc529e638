"""The files of openai/gpt-oss-20b by their published index and headers, at full size and without a weight: every name, dtype and shape has
its place, and what is not as published is refused by name."""

import json
import math
import re

import pytest

from moejax import cli
from moejax.hub.weights import read_config
from moejax.models.config import PRESETS

CONFIG = {
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": 200002,
    "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
    "initializer_range": 0.02, "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4,
    "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False, "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05, "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096, "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0", "use_cache": True, "vocab_size": 201088,
}  # fmt: skip
LAYER = {
    "input_layernorm.weight": (2880,), "post_attention_layernorm.weight": (2880,), "self_attn.sinks": (64,),
    "self_attn.q_proj.weight": (4096, 2880), "self_attn.q_proj.bias": (4096,), "self_attn.k_proj.weight": (512, 2880),
    "self_attn.k_proj.bias": (512,), "self_attn.v_proj.weight": (512, 2880), "self_attn.v_proj.bias": (512,),
    "self_attn.o_proj.weight": (2880, 4096), "self_attn.o_proj.bias": (2880,), "mlp.router.weight": (32, 2880), "mlp.router.bias": (32,),
    "mlp.experts.gate_up_proj_blocks": (32, 5760, 90, 16), "mlp.experts.gate_up_proj_scales": (32, 5760, 90),
    "mlp.experts.gate_up_proj_bias": (32, 5760), "mlp.experts.down_proj_blocks": (32, 2880, 90, 16),
    "mlp.experts.down_proj_scales": (32, 2880, 90), "mlp.experts.down_proj_bias": (32, 2880),
}  # fmt: skip
PUBLISHED = {f"model.layers.{layer}.{name}": shape for layer in range(24) for name, shape in LAYER.items()} | {
    "model.embed_tokens.weight": (201088, 2880), "model.norm.weight": (2880,), "lm_head.weight": (201088, 2880),
}  # fmt: skip
TOTAL_SIZE = 13_761_264_768
"""Of its index's metadata."""


def write(folder, tensors):
    """Three shards that have these headers, and holes in the place of numbers."""
    files = {f"model-{n:05}-of-00002.safetensors": {} for n in range(3)}
    where = {name: [*files][i % 3] for i, name in enumerate(tensors)}  # blocks and scales apart
    for name, shape in tensors.items():
        header = files[where[name]]
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        packed = name.endswith(("_blocks", "_scales"))
        size = math.prod(shape) * (1 if packed else 2)
        header[name] = {"dtype": "U8" if packed else "BF16", "shape": shape, "data_offsets": [end, end + size]}
    total = 0
    for name, header in files.items():
        text = json.dumps(header).encode()
        size = max(entry["data_offsets"][1] for entry in header.values())
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + size)
        total += size
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return total


def dry_run(folder, capsys):
    path = folder / "run.yaml"
    adapter = {"rank": 4, "targets": ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
    path.write_text(json.dumps({
        "name": "run", "runs_dir": str(folder / "runs"), "model": {"source": str(folder)}, "adapter": adapter,
        "data": {"batching": "fixed", "row_tokens": 16, "batch_rows": 1}, "training": {"steps": 1, "learning_rate": 1e-3},
    }))  # fmt: skip
    code = cli.main(["train", "--config", str(path), "--dry-run"])
    return code, capsys.readouterr()


def test_every_published_tensor_has_its_place(tmp_path, capsys):
    assert len(PUBLISHED) == 459 and write(tmp_path, PUBLISHED) == TOTAL_SIZE
    assert read_config(tmp_path) == PRESETS["gpt-oss-20b"]
    code, told = dry_run(tmp_path, capsys)
    assert code == 0 and "20,914,757,184" in told.out, told.err


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.7.mlp.experts.down_proj_scales", None, "down_proj"),
        ("model.layers.23.self_attn.sinks", None, r"tensor 'model.layers.23.self_attn.sinks' is missing"),
        ("model.layers.3.mlp.experts.gate_up_proj_blocks", (32, 5760, 45, 16), "gate_up_proj"),
        ("model.layers.3.self_attn.q_proj.weight", (2880, 4096), r"'model.layers.3.self_attn.q_proj.weight' has shape \[2880, 4096\]"),
        ("model.layers.24.self_attn.sinks", (64,), r"no place in a gpt-oss of 24 layers"),
    ],
)
def test_what_is_not_as_published_is_named(name, shape, message, tmp_path, capsys):
    changed = {n: s for n, s in PUBLISHED.items() if n != name} | ({} if shape is None else {name: shape})
    write(tmp_path, changed)
    code, told = dry_run(tmp_path, capsys)
    assert code == 2 and "Traceback" not in told.err
    assert re.search(message, " ".join(told.err.split())), told.err
