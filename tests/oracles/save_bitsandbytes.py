"""Tiny Mixtrals as transformers 4 saves them with bitsandbytes' NF4, and the logits of what their codes mean in fp32.

.venv-reference4/bin/python tests/oracles/save_bitsandbytes.py /tmp/bnb       # double, single, unquantized_router; fp4 and int8
.venv/bin/python tests/oracles/load_bitsandbytes.py /tmp/bnb                  # reads the first three, is refused the others
"""

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from bitsandbytes.functional import QuantState, dequantize_4bit
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, MixtralConfig, MixtralForCausalLM

# intermediate_size: an expert's matrix has more than one block of 256 scales. Rows are multiples of 64: see nf4.py.
SIZES = dict(
    vocab_size=64, hidden_size=64, intermediate_size=320, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=64, sliding_window=None, attn_implementation="eager",
)  # fmt: skip
NF4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4")
CASES = {
    "double": NF4 | dict(bnb_4bit_use_double_quant=True),
    "single": NF4 | dict(bnb_4bit_use_double_quant=False),
    "unquantized_router": NF4 | dict(bnb_4bit_use_double_quant=True, llm_int8_skip_modules=["gate", "lm_head"]),
    "fp4": dict(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": dict(load_in_8bit=True),
}


def meant(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight in fp32, from the files alone: what bitsandbytes makes of codes and scales."""
    tensors = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    out = {}
    for name, value in tensors.items():
        parts = {key: t for key, t in tensors.items() if key.startswith(f"{name}.")}
        if parts:
            state = QuantState.from_dict(parts, torch.device("cpu"))
            state.dtype = torch.float32
            out[name] = dequantize_4bit(value, state)
        elif name.endswith(".weight"):
            out[name] = value.float()
    return out


def main():
    out = Path(sys.argv[1])
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SIZES, initializer_range=0.2))
    with tempfile.TemporaryDirectory() as base:
        model.to(torch.bfloat16).save_pretrained(base)
        for case, settings in CASES.items():
            folder = out / case
            quantized = MixtralForCausalLM.from_pretrained(
                base, quantization_config=BitsAndBytesConfig(**settings), dtype=torch.bfloat16, device_map="cpu"
            )
            shutil.rmtree(folder, ignore_errors=True)
            quantized.save_pretrained(folder, max_shard_size="70KB")  # a matrix's parts may come to lie in two files
            if case in ("fp4", "int8"):
                continue
            plain = MixtralForCausalLM(MixtralConfig(**SIZES)).eval()
            plain.load_state_dict(meant(folder))
            with torch.no_grad():
                logits = plain(ids).logits.numpy()
            np.savez(folder / "logits.npz", tokens=ids.numpy(), logits=logits)
            print(f"transformers {transformers.__version__}, {case}: {len(list(folder.glob('*.safetensors')))} files")


if __name__ == "__main__":
    main()
