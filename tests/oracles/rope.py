"""Scaled rotary positions by transformers 5: frequencies and scale of released settings (tests/vectors/rope.npz). Run: make vectors."""

import json
from pathlib import Path

import numpy as np
import transformers
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

OUT = Path(__file__).parent.parent / "vectors"
HEADS = dict(hidden_size=64, num_attention_heads=1, max_position_embeddings=40960)
CASES = {  # numbers of a head, settings
    "gpt_oss": (64, dict(rope_theta=150000, factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
                         original_max_position_embeddings=4096)),
    "qwen3_moe": (128, dict(rope_theta=1e6, factor=4.0, original_max_position_embeddings=32768)),
    "qwen3_moe_own": (128, dict(rope_theta=1e6, factor=2.5)),
    "deepseek_v2": (64, dict(rope_theta=1e4, factor=40, beta_fast=32, beta_slow=1, mscale=0.707, mscale_all_dim=0.707,
                             original_max_position_embeddings=4096)),
    "two_scales": (32, dict(rope_theta=1e4, factor=16.0, mscale=1.0, mscale_all_dim=0.5, original_max_position_embeddings=1024)),
    "asked": (48, dict(rope_theta=5e5, factor=8.0, attention_factor=1.25, beta_fast=20.0, beta_slow=2.0,
                       original_max_position_embeddings=8192)),
    "one_pair": (2, dict(rope_theta=1e4, factor=4.0, original_max_position_embeddings=64)),
}  # fmt: skip


def main():
    out = {"versions": json.dumps({"transformers": transformers.__version__})}
    for case, (size, settings) in CASES.items():
        config = AutoConfig.for_model("qwen3_moe", **HEADS, head_dim=size, rope_parameters={"rope_type": "yarn", **settings})
        frequencies, scale = ROPE_INIT_FUNCTIONS["yarn"](config)
        out[f"{case}/settings"] = json.dumps({"size": size, "positions": HEADS["max_position_embeddings"], **config.rope_parameters})
        out |= {f"{case}/frequencies": frequencies.numpy(), f"{case}/scale": np.float64(scale)}
    np.savez_compressed(OUT / "rope.npz", **out)


if __name__ == "__main__":
    main()
