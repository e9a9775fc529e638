"""NF4 by bitsandbytes 0.50.2 on a CPU: tests/vectors/nf4.npz. Run: make vectors.

Last dimensions are multiples of 64, or odd: bitsandbytes' AVX-512 kernel looks up the wrong scales for other even ones.
"""

import json

import bitsandbytes
import numpy as np
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from mixtral import OUT

CASES = {
    "normal": ((48, 64), 1.0, torch.float32),
    "router": ((8, 128), 0.02, torch.float32),
    "zeros": ((16, 64), 1.0, torch.float32),
    "nested": ((160, 128), 3.0, torch.float32),
    "odd": ((77, 65), 1.0, torch.float32),
    "tiny": ((33, 3), 1.0, torch.float32),
    "bfloat16": ((32, 128), 0.05, torch.bfloat16),
    "float16": ((32, 128), 0.05, torch.float16),
    "large": ((20, 64), 1e4, torch.float32),
}


def main():
    torch.set_num_threads(1)
    out = {"versions": json.dumps({"torch": torch.__version__, "bitsandbytes": bitsandbytes.__version__})}
    for index, (case, (shape, scale, dtype)) in enumerate(CASES.items()):
        weight = (scale * torch.randn(shape, generator=torch.Generator().manual_seed(index))).to(dtype)
        if case == "zeros":
            weight[3:6] = 0
        out[f"{case}/weight"] = weight.float().numpy()
        out[f"{case}/dtype"] = str(dtype).removeprefix("torch.")
        for double in (False, True):
            codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double)
            key = f"{case}/{'double' if double else 'single'}"
            out[f"{key}/codes"], out[f"{key}/absmax"] = codes.numpy().reshape(-1), state.absmax.numpy()
            if double:
                out[f"{key}/offset"], out[f"{key}/nested_absmax"] = state.offset.numpy(), state.state2.absmax.numpy()
                out["dynamic_map"] = state.state2.code.numpy()
            for target in (torch.float32, torch.bfloat16):
                same = dict(absmax=state.absmax, shape=state.shape, code=state.code, blocksize=64, quant_type="nf4")
                value = dequantize_4bit(codes, QuantState(**same, dtype=target, offset=state.offset, state2=state.state2))
                out[f"{key}/{str(target).removeprefix('torch.')}"] = value.float().numpy()
    np.savez_compressed(OUT / "nf4.npz", **out)


if __name__ == "__main__":
    main()
