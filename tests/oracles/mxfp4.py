"""MXFP4 by transformers 5.24's own dequantization on a CPU: tests/vectors/mxfp4.npz. Run: make vectors."""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

OUT = Path(__file__).parent.parent / "vectors"
# Experts, rows, blocks of a row: every byte under every scale that is a number; rows of 2880 as in gpt-oss, an odd number of pairs of
# blocks; one block a row; three.
CASES = {"every": (1, 255, 16), "gpt_oss": (2, 1, 90), "one_block": (3, 5, 1), "three_blocks": (2, 4, 3)}


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
    np.savez_compressed(OUT / "mxfp4.npz", **out)


if __name__ == "__main__":
    main()
