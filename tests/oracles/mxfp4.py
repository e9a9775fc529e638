"""MXFP4 by transformers 5.24's own dequantization on a CPU, and what a gpt-oss with files as the released ones computes there in fp32:
tests/vectors/mxfp4.npz. Run: make vectors."""

import json
import tempfile
from pathlib import Path

import drawn
import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import GptOssConfig, GptOssForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

OUT = Path(__file__).parent.parent / "vectors"
# Experts, rows, blocks of a row: every byte under every scale that is a number; rows of 2880 as in gpt-oss, an odd number of pairs of
# blocks; one block a row; three.
CASES = {"every": (1, 255, 16), "gpt_oss": (2, 1, 90), "one_block": (3, 5, 1), "three_blocks": (2, 4, 3)}

SIZES = dict(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    num_local_experts=6, num_experts_per_tok=2, sliding_window=5, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
STORED = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]}


def model():
    """Logits and loss of a batch without padding, by config.json and files alone."""
    config = GptOssConfig(**SIZES)
    shapes = {name: tuple(p.shape) for name, p in GptOssForCausalLM(config).named_parameters()}
    ids = torch.tensor(np.random.default_rng(5).integers(0, 97, (2, 13)))
    with tempfile.TemporaryDirectory() as folder:
        files = {name: torch.tensor(value) for name, value in drawn.in_mxfp4(shapes).items()}
        save_file(files, f"{folder}/model.safetensors", {"format": "pt"})
        settings = config.to_dict() | {"architectures": ["GptOssForCausalLM"], "quantization_config": STORED}
        Path(folder, "config.json").write_text(json.dumps(settings))
        read = Mxfp4Config(dequantize=True)
        made = GptOssForCausalLM.from_pretrained(folder, quantization_config=read, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        found = made(ids, labels=ids)
    computed = {"model/logits": found.logits.numpy(), "model/loss": found.loss.numpy()}
    return {"model/config": json.dumps(settings), "model/ids": ids.numpy()} | computed


def main():
    out = {"versions": json.dumps({"torch": torch.__version__, "transformers": transformers.__version__})}
    for seed, (case, shape) in enumerate(CASES.items()):
        draw = np.random.default_rng(seed)
        blocks, scales = draw.integers(0, 256, (*shape, 16), np.uint8), draw.integers(0, 255, shape, np.uint8)
        if case == "every":
            blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), blocks.shape)
            scales = np.broadcast_to(np.arange(255, dtype=np.uint8)[:, None], scales.shape)
        out[f"{case}/blocks"], out[f"{case}/scales"] = blocks, scales
        for dtype, bits in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16)):
            value = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=dtype)  # [E, in, out]
            out[f"{case}/{str(dtype).removeprefix('torch.')}"] = value.transpose(1, 2).contiguous().view(bits).numpy()
    out |= model()
    np.savez_compressed(OUT / "mxfp4.npz", **out)


if __name__ == "__main__":
    main()
